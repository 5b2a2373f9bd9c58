//! The cable between two network namespaces that have no other: a thread that carries IP packets from one end to the
//! other, and does to them what a [`Cable`] each way does. What they are of, UDP or TCP, is all the same.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_e2e::network::Network;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cable::{Cable, Harm, Harmed};
use crate::tun;

/// Packets that are taken from one end before the other has its turn.
const TURN: usize = 256;
/// Longest time until a change of harm is seen by what is under way.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A way over the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source of the migration to its destination.
    ToDestination,
    /// Back.
    ToSource,
}

struct Shared {
    cables: [Cable<()>; 2],
    over: bool,
}

/// A thread that carries; it ends with this.
pub struct Relay {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// Carries between the two ends of `network`, whose cable it is.
    pub fn new(network: &Network, seed: u64) -> Self {
        let ends = [0, 1].map(|end| {
            let namespace = File::open(network.file(end)).expect("a namespace");
            tun::open(&namespace, "cable").expect("an end of the cable")
        });
        let cables = [Cable::new(seed), Cable::new(!seed)];
        let shared = Arc::new(Mutex::new(Shared { cables, over: false }));
        let mine = shared.clone();
        let thread = std::thread::spawn(move || carry(&ends, &mine));
        Self { shared, thread: Some(thread) }
    }

    /// Does this to what goes to the destination, and to what comes back, from now on.
    pub fn set(&self, to_destination: Harm, to_source: Harm) {
        let mut shared = lock(&self.shared);
        shared.cables[0].set(to_destination);
        shared.cables[1].set(to_source);
    }

    /// What was done so far, one way.
    pub fn harmed(&self, way: Way) -> Harmed {
        lock(&self.shared).cables[way as usize].harmed()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        lock(&self.shared).over = true;
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            panic!("the relay failed: {e}");
        }
    }
}

/// A packet, if one leaves there.
fn hear<'a>(mut end: &File, buffer: &'a mut [u8]) -> io::Result<Option<&'a mut [u8]>> {
    match end.read(buffer) {
        Ok(length) => Ok(Some(&mut buffer[..length])),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// The kernel drops a datagram of UDP that was changed on its way, before anybody else sees it. Here none has a
/// checksum (RFC 768 allows that in IPv4): QUIC is to find out itself.
fn without_checksum(packet: &mut [u8]) {
    const UDP: u8 = 17;
    let Some(first) = packet.first() else { return };
    let header = usize::from(first & 15) * 4;
    if first >> 4 == 4 && packet.get(9) == Some(&UDP) {
        packet.get_mut(header + 6..header + 8).into_iter().for_each(|sum| sum.fill(0));
    }
}

fn carry(ends: &[File; 2], shared: &Mutex<Shared>) -> io::Result<()> {
    let began = Instant::now();
    let mut buffer = vec![0; 1 << 16];
    loop {
        for (way, end) in ends.iter().enumerate() {
            // Others have their turn, too.
            for _ in 0..TURN {
                let Some(packet) = hear(end, &mut buffer)? else { break };
                without_checksum(packet);
                lock(shared).cables[way].put(began.elapsed(), (), packet.to_vec());
            }
        }
        let mut due = {
            let mut shared = lock(shared);
            if shared.over {
                return Ok(());
            }
            let now = began.elapsed();
            for (cable, mut end) in shared.cables.iter_mut().zip(ends.iter().rev()) {
                while let Some(((), packet)) = cable.take(now) {
                    // What cannot be delivered is lost, as with any cable.
                    let _ = end.write(&packet);
                }
            }
            let next = shared.cables.iter().filter_map(Cable::next).min();
            next.map_or(LOOK_AGAIN, |next| next.saturating_sub(now)).min(LOOK_AGAIN)
        };
        due = due.max(Duration::from_micros(50));
        let mut all = ends.each_ref().map(|end| PollFd::new(end, PollFlags::IN));
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(due.subsec_nanos()) };
        match poll(&mut all, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
