//! The gate of a listener, or of several at one address: who gets a handshake, and where it leads.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc;

use crate::gate::{Gate, Pass};
use crate::{Channel, LinkError};

/// What comes of a handshake.
pub(crate) type Accepted = Result<Channel, LinkError>;

pub(crate) struct Door {
    gate: Mutex<Gate>,
    began: Instant,
}

impl Door {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { gate: Mutex::new(Gate::new()), began: Instant::now() })
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a handshake with `from`, or what becomes of it otherwise. `to` is told of an address that comes too
    /// often.
    pub(crate) fn ask(
        self: &Arc<Self>,
        from: IpAddr,
        proven: bool,
        to: &mpsc::Sender<Accepted>,
    ) -> Result<Place, Pass> {
        let pass = self.gate().ask(self.began.elapsed(), from, proven);
        match pass {
            Pass::Accept => return Ok(Place { door: self.clone(), from, proven }),
            Pass::Later { first: true } => {
                let (remote, per_s) = (from.to_string(), Gate::PER_ADDRESS_PER_S);
                drop(to.try_send(Err(LinkError::TooOften { remote, per_s })));
            }
            Pass::Later { first: false } | Pass::Prove | Pass::Busy => {}
        }
        Err(pass)
    }
}

/// A place in the gate, until it is dropped.
pub(crate) struct Place {
    door: Arc<Door>,
    from: IpAddr,
    proven: bool,
}

impl Place {
    /// Hands over what came of the handshake; it is over when that was taken.
    pub(crate) async fn hand_over(self, accepted: Accepted, to: &mpsc::Sender<Accepted>) {
        match accepted {
            // The listener may be gone by now, and the channel is dropped with it.
            Ok(channel) => drop(to.send(Ok(channel)).await),
            Err(e) => {
                tracing::debug!("a peer did not get in: {e}");
                // Failures that nobody asks for must not keep out others.
                drop(to.try_send(Err(e)));
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.gate().done(self.from, self.proven);
    }
}
