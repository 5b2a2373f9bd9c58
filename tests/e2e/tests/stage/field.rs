//! Links, and destinations that take machines in, all in this process.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ferry_migrate::{
    Arrival, Guest, Host, ReceiveEvent, ReceiveOptions, SendHandle, SendOptions, Sent,
};
use ferry_transport::{
    Connector, EitherConnector, Identity, LinkChoice, Listener, Over, Sockets, memory, pki,
};
use tokio::runtime::{Handle, Runtime};

/// How two hosts are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Memory,
    Quic,
    Tls,
}

/// A connector and its listener.
pub struct Links {
    pub connector: Arc<dyn Connector>,
    pub listener: Box<dyn Listener>,
}

impl Links {
    pub fn new(link: Link, handle: &Handle) -> Self {
        match link {
            Link::Memory => {
                let (connector, listener) = memory::pair(4);
                Self { connector: Arc::new(connector), listener: Box::new(listener) }
            }
            Link::Quic | Link::Tls => {
                let dir = tempfile::tempdir().unwrap();
                pki::init(dir.path(), &["left".to_owned(), "right".to_owned()]).unwrap();
                let identity = |name| Identity::load(&dir.path().join(name)).unwrap();
                let _inside = handle.enter();
                let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let over = if link == Link::Quic { Over::Quic } else { Over::Tls };
                let only = LinkChoice::Only(over);
                let listener = Sockets::bind(any, only).unwrap().listen(&identity("right"));
                let listener = listener.unwrap();
                let to = listener.local_addr().unwrap();
                let connector = EitherConnector::new(&identity("left"), to, only).unwrap();
                Self { connector: Arc::new(connector), listener: Box::new(listener) }
            }
        }
    }
}

/// A host that takes machines in, on a runtime of its own.
pub struct Destination<G> {
    /// Leads to it.
    pub connector: Arc<dyn Connector>,
    runtime: Option<Runtime>,
    events: Receiver<ReceiveEvent<G>>,
}

impl<G: Guest + 'static> Destination<G> {
    pub fn start<H: Host<Guest = G> + 'static>(link: Link, host: H) -> Self {
        Self::start_with(link, host, ReceiveOptions::default())
    }

    pub fn start_with<H: Host<Guest = G> + 'static>(
        link: Link,
        host: H,
        options: ReceiveOptions,
    ) -> Self {
        Self::start_on(|handle| Links::new(link, handle), host, options)
    }

    pub fn start_on<H: Host<Guest = G> + 'static>(
        links: impl FnOnce(&Handle) -> Links,
        host: H,
        options: ReceiveOptions,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let Links { connector, listener } = links(runtime.handle());
        let (sender, events) = channel();
        runtime.spawn(ferry_migrate::receive(listener, Arc::new(host), options, move |event| {
            let _ = sender.send(event);
        }));
        Self { connector, runtime: Some(runtime), events }
    }

    /// Where its tasks run.
    pub fn handle(&self) -> Handle {
        self.runtime.as_ref().unwrap().handle().clone()
    }

    /// The next thing that the host was told.
    pub fn event(&self, within: Duration) -> Option<ReceiveEvent<G>> {
        self.events.recv_timeout(within).ok()
    }

    /// The machine that arrives, and the end of its session, if both come within 10 s.
    pub fn arrival(&self) -> Option<(G, Arrival)> {
        let mut arrived = None;
        loop {
            match self.event(Duration::from_secs(10))? {
                ReceiveEvent::Arrived { guest, .. } => arrived = Some(guest),
                ReceiveEvent::Ended { arrival, .. } if arrived.is_some() => {
                    return arrived.map(|guest| (guest, arrival));
                }
                ReceiveEvent::Ended { .. }
                | ReceiveEvent::Arriving { .. }
                | ReceiveEvent::Waiting { .. }
                | ReceiveEvent::Recalled { .. }
                | ReceiveEvent::Turned(_) => {}
            }
        }
    }

    /// How the next session to end, ended; it must not bring a machine.
    #[track_caller]
    pub fn void(&self) -> String {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            match self.event(Duration::from_millis(100)) {
                Some(ReceiveEvent::Ended { arrival: Arrival::Void(why), .. }) => return why,
                Some(ReceiveEvent::Ended { arrival, .. }) => panic!("it ran: {arrival:?}"),
                Some(ReceiveEvent::Arrived { .. }) => panic!("a machine arrived"),
                _ => {}
            }
        }
        panic!("the session did not end within 10 s");
    }
}

impl<G> Drop for Destination<G> {
    fn drop(&mut self) {
        // A machine that a failed test did not take: its threads would wait for pages that never come.
        for event in self.events.try_iter() {
            if let ReceiveEvent::Arrived { fetching: Some(fetching), .. } = &event {
                fetching.abandon();
            }
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Moves `source` to where `connector` leads.
pub fn migrate(
    source: &mut dyn Guest,
    connector: &Arc<dyn Connector>,
    options: &SendOptions,
) -> Sent {
    ferry_migrate::send(source, connector.clone(), options, &SendHandle::default(), &mut |_| {})
}
