//! The source's control channel: a thread that connects, sends and receives messages.

use std::sync::Arc;
use std::thread::JoinHandle;

use ferry_protocol::{Hello, ToDestination, ToSource, wire};
use ferry_transport::{ByteSource, Channel, Connector, FrameReader, send_message};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::send_lane::{FAREWELL, open};

/// What the control thread tells the engine.
#[derive(Debug)]
pub(crate) enum ControlEvent {
    Connected,
    Message(ToSource),
    Lost(String),
}

type Tell = Arc<dyn Fn(ControlEvent) + Send + Sync>;

enum Order {
    Send(Vec<u8>),
    /// Whether to stay until the peer has hung up.
    Finish(bool),
}

/// The engine's hold on the control thread.
pub(crate) struct Control {
    orders: UnboundedSender<Order>,
    /// Set when the engine waits for the thread's end.
    ending: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub(crate) fn send(&self, message: &ToDestination) {
        match wire::encode(message) {
            Ok(bytes) => {
                let _ = self.orders.send(Order::Send(bytes));
            }
            Err(e) => tracing::error!("{e}"),
        }
    }

    /// Nothing more will be sent: close once the peer has it.
    pub(crate) fn finish(&self) {
        let _ = self.orders.send(Order::Finish(false));
    }

    /// As [`finish`](Self::finish), and wait until the peer hangs up: a machine that does not come is gone there then,
    /// and its name is free.
    pub(crate) fn part(&self) {
        let _ = self.orders.send(Order::Finish(true));
    }

    /// Leaves the thread to itself: it ends soon.
    pub(crate) fn abandon(self) {
        self.ending.send_replace(true);
    }

    pub(crate) fn join(&mut self) {
        self.finish();
        self.ending.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts the thread: it connects and says `hello`, and then carries out orders. No answer is longer than
/// `max_message`.
pub(crate) fn start(
    connector: Arc<dyn Connector>,
    hello: Hello,
    max_message: usize,
    tell: impl Fn(ControlEvent) + Send + Sync + 'static,
) -> Control {
    let tell: Tell = Arc::new(tell);
    let (orders, receiver) = unbounded_channel();
    let (ending, mut ended) = watch::channel(false);
    let run = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(e) => {
                return tell(ControlEvent::Lost(format!(
                    "no runtime for the control channel: {e}"
                )));
            }
        };
        runtime.block_on(async {
            tokio::select! {
                () = talk(connector.as_ref(), &hello, max_message, receiver, tell) => {}
                // A peer that is alive but reads nothing must not hold up the end.
                () = async {
                    let _ = ended.wait_for(|ended| *ended).await;
                    tokio::time::sleep(FAREWELL).await;
                } => {}
            }
        });
    };
    // Without a thread the orders' receiver is dropped, and the engine's deadline ends the migration.
    let thread = std::thread::Builder::new().name("ferry-control".into()).spawn(run).ok();
    Control { orders, ending, thread }
}

async fn talk(
    connector: &dyn Connector,
    hello: &Hello,
    max_message: usize,
    mut orders: UnboundedReceiver<Order>,
    tell: Tell,
) {
    let Channel { source, mut sink, .. } = match open(connector, hello).await {
        Ok(channel) => channel,
        Err(e) => return tell(ControlEvent::Lost(e.to_string())),
    };
    tell(ControlEvent::Connected);
    let reading = tokio::spawn(read(source, max_message, tell.clone()));
    let mut waits = false;
    while let Some(order) = orders.recv().await {
        match order {
            Order::Send(bytes) => {
                if let Err(e) = send_message(sink.as_mut(), &bytes).await {
                    return tell(ControlEvent::Lost(e.to_string()));
                }
            }
            Order::Finish(wait) => {
                waits = wait;
                break;
            }
        }
    }
    // Returns when the peer has it all, or is gone.
    let _ = sink.finish().await;
    if waits {
        let _ = reading.await;
    }
}

async fn read(source: Box<dyn ByteSource>, max_message: usize, tell: Tell) {
    let mut reader = FrameReader::new(source);
    loop {
        let event = match reader.read_message(max_message).await {
            Ok(Some(bytes)) => match wire::decode(&bytes) {
                Ok::<ToSource, _>(message) => ControlEvent::Message(message.plain()),
                Err(e) => ControlEvent::Lost(format!("the destination sent nonsense: {e}")),
            },
            Ok(None) => ControlEvent::Lost("the destination closed the control channel".into()),
            Err(e) => ControlEvent::Lost(e.to_string()),
        };
        let lost = matches!(event, ControlEvent::Lost(_));
        tell(event);
        if lost {
            return;
        }
    }
}
