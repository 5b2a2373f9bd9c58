//! A host that lends bundles and can be stopped, started again and replaced by a liar; and one that reads them.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_bundle::{BundleError, Chain};
use ferry_depot::{Depot, DepotEvent, Network, serve};
use ferry_protocol::{Hello, MAX_TO_DEPOT_BYTES, ToDepot, ToReader, wire};
use ferry_transport::memory::{self, MemoryConnector};
use ferry_transport::{
    BoxFuture, Channel, Connector, FrameReader, LinkError, Listener, send_message,
};
use tokio::runtime::{Builder, Runtime};

/// How long a reader tries again, where a test does not wait for its end.
pub const LONG: Duration = Duration::from_secs(60);

/// The address at which somebody lends, or nobody.
#[derive(Default)]
pub struct Address(Mutex<Option<MemoryConnector>>);

impl Address {
    /// The same, for host `name`.
    pub fn named(&self, name: &str) -> Self {
        Self(Mutex::new(self.0.lock().unwrap().as_ref().map(|connector| connector.named(name))))
    }
}

impl Connector for Address {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        let connector = self.0.lock().unwrap().clone();
        Box::pin(async move {
            match connector {
                Some(connector) => connector.connect().await,
                None => Err(LinkError::Refused { remote: "the depot".into() }),
            }
        })
    }

    fn describe(&self) -> String {
        "the depot".into()
    }
}

/// Whoever is at an address, until it is dropped.
pub struct Lender {
    address: Arc<Address>,
    events: Arc<Mutex<Vec<DepotEvent>>>,
    runtime: Option<Runtime>,
}

impl Lender {
    /// An honest one.
    pub fn of(address: &Arc<Address>, dir: &Path) -> Self {
        let depot = Depot::open(dir).unwrap();
        let events: Arc<Mutex<Vec<DepotEvent>>> = Arc::default();
        let told = events.clone();
        let tell = move |event| told.lock().unwrap().push(event);
        let mut lender = Self::new(address, |listener| serve(Box::new(listener), depot, tell));
        lender.events = events;
        lender
    }

    /// One that does what `lend` does with each channel.
    pub fn who<F: Future<Output = ()> + Send + 'static>(
        address: &Arc<Address>,
        lend: impl Fn(Channel) -> F + Send + 'static,
    ) -> Self {
        Self::new(address, |mut listener| async move {
            while let Some(Ok(channel)) = listener.accept().await {
                tokio::spawn(lend(channel));
            }
        })
    }

    fn new<F: Future<Output = ()> + Send + 'static>(
        address: &Arc<Address>,
        run: impl FnOnce(memory::MemoryListener) -> F,
    ) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (connector, listener) = memory::pair(1024);
        let run = run(listener);
        runtime.spawn(run);
        *address.0.lock().unwrap() = Some(connector);
        Self { address: address.clone(), events: Arc::default(), runtime: Some(runtime) }
    }

    /// What it said of peers that it turned away.
    pub fn turned(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let turned = events.iter().filter_map(|event| match event {
            DepotEvent::Turned(why) => Some(why.clone()),
            DepotEvent::Reads { .. } => None,
        });
        turned.collect()
    }

    /// The bundles that it said are read.
    pub fn read(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let read = events.iter().filter_map(|event| match event {
            DepotEvent::Reads { bundle, .. } => Some(bundle.clone()),
            DepotEvent::Turned(_) => None,
        });
        read.collect()
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        *self.address.0.lock().unwrap() = None;
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// A shelf on which every host is `address`.
pub fn network(address: &Arc<Address>, patience: Duration) -> Network {
    let address = address.clone();
    Network::new(move |_| Ok(address.clone()), patience)
}

/// The bundle `name` of the host at `address`.
pub fn open(address: &Arc<Address>, name: &str) -> Result<Arc<Chain>, BundleError> {
    open_for(address, name, LONG)
}

pub fn open_for(
    address: &Arc<Address>,
    name: &str,
    patience: Duration,
) -> Result<Arc<Chain>, BundleError> {
    Chain::open_on(&network(address, patience), &there(name), &[]).map(Arc::new)
}

pub fn there(name: &str) -> PathBuf {
    PathBuf::from(format!("ferry://host1:7001/{name}"))
}

/// One end of a channel, spoken on by hand.
pub struct Talk {
    channel: Box<dyn ferry_transport::ByteSink>,
    reader: FrameReader,
}

impl Talk {
    pub fn on(channel: Channel) -> Self {
        Self { channel: channel.sink, reader: FrameReader::new(channel.source) }
    }

    /// A reader's, with its hello said.
    pub async fn to(address: &Address) -> Self {
        let mut talk = Self::on(address.connect().await.unwrap());
        talk.say_bytes(&Hello::Bundles { version: 1 }.encode()).await;
        talk
    }

    /// A peer that has gone does not hear it.
    pub async fn say_bytes(&mut self, bytes: &[u8]) {
        let _ = send_message(self.channel.as_mut(), bytes).await;
    }

    pub async fn say(&mut self, message: &ToDepot) {
        self.say_bytes(&wire::encode(message).unwrap()).await;
    }

    /// What a depot answers, with the bytes behind it; or how the link ended.
    pub async fn answer(&mut self) -> Result<(ToReader, Vec<u8>), String> {
        let bytes = self.reader.read_message(1024).await.map_err(|e| e.to_string())?;
        let answer = wire::decode(&bytes.ok_or("closed")?).unwrap();
        let data = match &answer {
            ToReader::Data { bytes } => {
                let bytes = usize::try_from(*bytes).unwrap();
                self.reader.fill(bytes).await.unwrap().unwrap().to_vec()
            }
            _ => Vec::new(),
        };
        Ok((answer, data))
    }

    /// What a reader asks for; none when it has gone.
    pub async fn asked(&mut self) -> Option<ToDepot> {
        let bytes = self.reader.read_message(MAX_TO_DEPOT_BYTES).await.ok()??;
        Some(wire::decode(&bytes).unwrap())
    }

    pub async fn hello(&mut self) {
        self.reader.read_message(1024).await.unwrap();
    }

    /// Answers as a depot does.
    pub async fn reply(&mut self, answer: &ToReader, data: &[u8]) {
        self.say_bytes(&wire::encode(answer).unwrap()).await;
        let _ = self.channel.send(data.to_vec().into()).await;
    }
}
