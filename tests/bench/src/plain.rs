//! A plain copy over the same link: what a migration can reach at most on this machine.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_transport::{Channel, Connector, EitherConnector, LinkChoice, Listener, Over, Sockets};

use crate::Failure;
use crate::figures::{Cost, cpu_time, thread_cpu_time};
use crate::moves::{Pki, runtime};

/// What a copy took, and how much of its CPU time was the source's.
pub(crate) struct Copied {
    pub(crate) cost: Cost,
    pub(crate) source_cpu: Duration,
}

/// Sends `bytes` over `connections` connections of `link`, each from a thread with a runtime of its own, as the
/// engine's lanes do. The receiver counts and drops them, or keeps them in memory that it touches for the
/// first time, as a machine's destination must. Connecting is left out.
pub(crate) fn copy(
    pki: &Pki,
    link: Over,
    bytes: &Bytes,
    connections: u16,
    keep: bool,
) -> Result<Copied, Failure> {
    let share = bytes.len().div_ceil(usize::from(connections));
    let connections = usize::from(connections);
    let destination = runtime("plain")?;
    let identity = pki.destination()?;
    let only = LinkChoice::Only(link);
    let mut listener =
        destination.block_on(async { Sockets::bind(Pki::any(), only)?.listen(&identity) })?;
    let to = listener.local_addr().ok_or("no address")?;
    let receiver = destination.spawn(async move {
        let mut channels = Vec::new();
        for _ in 0..connections {
            let channel = listener.accept().await.ok_or("no listener")??;
            channels.push(tokio::spawn(take(channel, keep.then_some(share))));
        }
        let (mut received, mut all_kept) = (0, Vec::new());
        for channel in channels {
            let (bytes, kept) = channel.await??;
            received += bytes;
            all_kept.push(kept);
        }
        // Given back to the system after the clock was read.
        Ok::<_, Failure>((received, all_kept))
    });

    let barrier = Arc::new(Barrier::new(connections + 1));
    let lanes: Vec<_> = (0..connections)
        .map(|lane| {
            let connector = EitherConnector::new(&pki.source()?, to, only)?;
            let part = bytes.slice(lane * share..bytes.len().min((lane + 1) * share));
            let barrier = barrier.clone();
            let lane = thread::Builder::new().name("plain-lane".into());
            Ok(lane.spawn(move || send(&connector, part, &barrier))?)
        })
        .collect::<Result<_, Failure>>()?;
    barrier.wait();
    let (began, cpu_before) = (Instant::now(), cpu_time());
    let mut source_cpu = Duration::ZERO;
    for lane in lanes {
        source_cpu += lane.join().map_err(|_| "a lane panicked")??;
    }
    let (received, _kept) = destination.block_on(receiver)??;
    let cost = Cost { took: began.elapsed(), cpu: cpu_time().saturating_sub(cpu_before) };
    if received != bytes.len() {
        return Err(format!("{received} bytes came, {} were sent", bytes.len()).into());
    }
    Ok(Copied { cost, source_cpu })
}

/// Returns the CPU time of this thread meanwhile.
fn send(
    connector: &dyn Connector,
    mut part: Bytes,
    barrier: &Barrier,
) -> Result<Duration, Failure> {
    const PIECE_BYTES: usize = 1 << 20;
    let lane = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    lane.block_on(async {
        let connected = connector.connect().await;
        barrier.wait();
        let mut channel = connected?;
        let began = thread_cpu_time();
        while !part.is_empty() {
            let piece = part.split_to(PIECE_BYTES.min(part.len()));
            channel.sink.send(piece).await?;
        }
        channel.sink.finish().await?;
        Ok(thread_cpu_time().saturating_sub(began))
    })
}

/// Takes all that comes, and returns how much it was, and it; `keep`: bytes to make room for.
async fn take(channel: Channel, keep: Option<usize>) -> Result<(usize, Option<Vec<u8>>), Failure> {
    let Channel { mut source, sink, .. } = channel;
    let _open = sink;
    let mut kept = keep.map(Vec::with_capacity);
    let mut received = 0;
    while let Some(first) = source.recv().await? {
        let mut next = Some(first);
        while let Some(piece) = next {
            received += piece.len();
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(&piece);
            }
            next = source.ready();
        }
    }
    Ok((received, kept))
}
