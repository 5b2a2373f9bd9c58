//! A plain copy over QUIC on loopback: what a migration can reach at most on this machine.
//!
//! `cargo run --release -p ferry-transport --example quic_rate [MIB] [REPEATS]`

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use ferry_transport::{Channel, Connector, Identity, Listener, QuicConnector, QuicListener, pki};

type Error = Box<dyn std::error::Error + Send + Sync>;

const PIECE_BYTES: usize = 1 << 20;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let mib: usize = args.next().map_or(Ok(512), |a| a.parse())?;
    let repeats: usize = args.next().map_or(Ok(5), |a| a.parse())?;
    let dir = tempfile::tempdir()?;
    let hosts = ["source".to_owned(), "destination".to_owned()];
    pki::init(dir.path(), &hosts)?;
    for connections in [1, 2] {
        let mut rates = Vec::new();
        for _ in 0..repeats {
            rates.push(copy(dir.path(), mib << 20, connections)?);
        }
        rates.sort_by(f64::total_cmp);
        println!(
            "{connections} connection(s), {mib} MiB: median {:.1} Gbit/s, best {:.1}, worst {:.1}",
            rates[repeats / 2],
            rates[repeats - 1],
            rates[0],
        );
    }
    Ok(())
}

/// Sends `bytes` over `connections`, each from a thread of its own; returns Gbit/s, connecting left out.
fn copy(pki: &Path, bytes: usize, connections: usize) -> Result<f64, Error> {
    let destination = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let identity = Identity::load(&pki.join("destination"))?;
    let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let mut listener = destination.block_on(async { QuicListener::bind(&identity, any) })?;
    let to = listener.local_addr().ok_or("no address")?;
    let receiver = destination.spawn(async move {
        let mut channels = Vec::new();
        for _ in 0..connections {
            let Channel { mut source, sink, .. } =
                listener.accept().await.ok_or("no listener")??;
            channels.push(tokio::spawn(async move {
                let _open = sink;
                let mut received = 0;
                while let Some(piece) = source.recv().await? {
                    received += piece.len();
                    while let Some(piece) = source.ready() {
                        received += piece.len();
                    }
                }
                Ok::<_, Error>(received)
            }));
        }
        let mut received = 0;
        for channel in channels {
            received += channel.await??;
        }
        Ok::<_, Error>(received)
    });

    let identity = Identity::load(&pki.join("source"))?;
    let barrier = std::sync::Arc::new(std::sync::Barrier::new(connections + 1));
    let piece = Bytes::from((0..=250).cycle().take(PIECE_BYTES).collect::<Vec<u8>>());
    let lanes: Vec<_> = (0..connections)
        .map(|_| {
            let connector = QuicConnector::new(&identity, to)?;
            let (barrier, piece) = (barrier.clone(), piece.clone());
            Ok(thread::spawn(move || {
                let lane = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                lane.block_on(async {
                    let connected = connector.connect().await;
                    barrier.wait();
                    let mut channel = connected?;
                    for _ in 0..bytes / PIECE_BYTES / connections {
                        channel.sink.send(piece.clone()).await?;
                    }
                    channel.sink.finish().await?;
                    Ok::<_, Error>(())
                })
            }))
        })
        .collect::<Result<_, Error>>()?;
    barrier.wait();
    let start = Instant::now();
    for lane in lanes {
        lane.join().map_err(|_| "a lane panicked")??;
    }
    let received = destination.block_on(receiver)??;
    let seconds = start.elapsed().as_secs_f64();
    if received != bytes / PIECE_BYTES / connections * PIECE_BYTES * connections {
        return Err(format!("{received} bytes came, {bytes} were sent").into());
    }
    Ok(received as f64 * 8.0 / seconds / 1e9)
}
