//! A plain copy over the same link: what a migration can reach at most on this machine.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use ferry_transport::{Channel, Connector, Listener, QuicListener};

use crate::Failure;
use crate::figures::{Cost, cpu_time};
use crate::moves::{Pki, runtime};

/// Sends `bytes` over `connections` connections, each from a thread with a runtime of its own, as the
/// engine's lanes do; the receiver counts and drops them. Connecting is left out.
pub(crate) fn copy(pki: &Pki, bytes: &Bytes, connections: u16) -> Result<Cost, Failure> {
    let connections = usize::from(connections);
    let destination = runtime("plain")?;
    let identity = pki.destination()?;
    let mut listener = destination.block_on(async { QuicListener::bind(&identity, Pki::any()) })?;
    let to = listener.local_addr().ok_or("no address")?;
    let receiver = destination.spawn(async move {
        let mut channels = Vec::new();
        for _ in 0..connections {
            let channel = listener.accept().await.ok_or("no listener")??;
            channels.push(tokio::spawn(count(channel)));
        }
        let mut received = 0;
        for channel in channels {
            received += channel.await??;
        }
        Ok::<_, Failure>(received)
    });

    let barrier = Arc::new(Barrier::new(connections + 1));
    let share = bytes.len().div_ceil(connections);
    let lanes: Vec<_> = (0..connections)
        .map(|lane| {
            let connector = pki.connector(to)?;
            let part = bytes.slice(lane * share..bytes.len().min((lane + 1) * share));
            let barrier = barrier.clone();
            let lane = thread::Builder::new().name("plain-lane".into());
            Ok(lane.spawn(move || send(&connector, part, &barrier))?)
        })
        .collect::<Result<_, Failure>>()?;
    barrier.wait();
    let (began, cpu_before) = (Instant::now(), cpu_time());
    for lane in lanes {
        lane.join().map_err(|_| "a lane panicked")??;
    }
    let received: usize = destination.block_on(receiver)??;
    let cost = Cost { took: began.elapsed(), cpu: cpu_time().saturating_sub(cpu_before) };
    if received != bytes.len() {
        return Err(format!("{received} bytes came, {} were sent", bytes.len()).into());
    }
    Ok(cost)
}

fn send(connector: &dyn Connector, mut part: Bytes, barrier: &Barrier) -> Result<(), Failure> {
    const PIECE_BYTES: usize = 1 << 20;
    let lane = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    lane.block_on(async {
        let connected = connector.connect().await;
        barrier.wait();
        let mut channel = connected?;
        while !part.is_empty() {
            let piece = part.split_to(PIECE_BYTES.min(part.len()));
            channel.sink.send(piece).await?;
        }
        channel.sink.finish().await?;
        Ok(())
    })
}

async fn count(channel: Channel) -> Result<usize, Failure> {
    let Channel { mut source, sink, .. } = channel;
    let _open = sink;
    let mut received = 0;
    while let Some(piece) = source.recv().await? {
        received += piece.len();
        while let Some(piece) = source.ready() {
            received += piece.len();
        }
    }
    Ok(received)
}
