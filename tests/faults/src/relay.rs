//! The cable between two network namespaces that have no other: a thread that carries UDP datagrams, and
//! does to them what a [`Cable`] each way does.
//!
//! A thread is in one network namespace at a time, and a socket in that of the thread that made it: so the
//! relay listens in the first one, then enters the second for good, and has a socket there for each
//! address that it hears from.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_e2e::network::Network;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cable::{Cable, Harm, Harmed};

/// A burst of a whole congestion window fits: what is lost, a cable loses.
const BUFFER_BYTES: usize = 16 << 20;
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
    cables: [Cable<usize>; 2],
    over: bool,
}

/// A thread that carries; it ends with this.
pub struct Relay {
    shared: Arc<Mutex<Shared>>,
    addr: SocketAddr,
    thread: Option<JoinHandle<io::Result<()>>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Relay {
    /// Carries between an address of its own in the first namespace and `far` in the second.
    pub fn new(network: &Network, far: SocketAddr, seed: u64) -> Self {
        let [near_ns, far_ns] =
            [0, 1].map(|end| File::open(network.file(end)).expect("a namespace"));
        let cables = [Cable::new(seed), Cable::new(!seed)];
        let shared = Arc::new(Mutex::new(Shared { cables, over: false }));
        let (tell, told) = std::sync::mpsc::channel();
        let mine = shared.clone();
        let thread = std::thread::spawn(move || {
            enter(&near_ns)?;
            let near = socket()?;
            enter(&far_ns)?;
            // Whoever asked waits for it.
            let _ = tell.send(near.local_addr()?);
            carry(&near, far, &mine)
        });
        let addr = told.recv().expect("the relay begins");
        Self { shared, addr, thread: Some(thread) }
    }

    /// Where it listens, in the first namespace.
    pub fn addr(&self) -> SocketAddr {
        self.addr
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

fn enter(namespace: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES)?;
    Ok(socket)
}

/// A datagram, if one is there. That the last one could not be delivered is no trouble of this one's.
fn hear(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
    loop {
        match socket.recv_from(buffer) {
            Ok(heard) => return Ok(Some(heard)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(e) => return Err(e),
        }
    }
}

fn carry(near: &UdpSocket, far: SocketAddr, shared: &Mutex<Shared>) -> io::Result<()> {
    let began = Instant::now();
    // Who speaks from the first namespace, and the socket that stands for him in the second.
    let mut flows: Vec<(SocketAddr, UdpSocket)> = Vec::new();
    let mut known: HashMap<SocketAddr, usize> = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        while let Some((length, from)) = hear(near, &mut buffer)? {
            let flow = match known.get(&from) {
                Some(flow) => *flow,
                None => {
                    let stands_in = socket()?;
                    stands_in.connect(far)?;
                    known.insert(from, flows.len());
                    flows.push((from, stands_in));
                    flows.len() - 1
                }
            };
            lock(shared).cables[0].put(began.elapsed(), flow, buffer[..length].into());
        }
        for (flow, (_, socket)) in flows.iter().enumerate() {
            while let Some((length, _)) = hear(socket, &mut buffer)? {
                lock(shared).cables[1].put(began.elapsed(), flow, buffer[..length].into());
            }
        }
        let mut due = {
            let mut shared = lock(shared);
            if shared.over {
                return Ok(());
            }
            let now = began.elapsed();
            // What cannot be delivered is lost, as with any cable.
            while let Some((flow, bytes)) = shared.cables[0].take(now) {
                let _ = flows[flow].1.send(&bytes);
            }
            while let Some((flow, bytes)) = shared.cables[1].take(now) {
                let _ = near.send_to(&bytes, flows[flow].0);
            }
            let next = shared.cables.iter().filter_map(Cable::next).min();
            next.map_or(LOOK_AGAIN, |next| next.saturating_sub(now)).min(LOOK_AGAIN)
        };
        due = due.max(Duration::from_micros(50));
        let sockets = std::iter::once(near).chain(flows.iter().map(|(_, socket)| socket));
        let mut all: Vec<_> = sockets.map(|s| PollFd::new(s, PollFlags::IN)).collect();
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(due.subsec_nanos()) };
        match poll(&mut all, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
