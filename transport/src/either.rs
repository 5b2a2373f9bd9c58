//! QUIC and TLS at one address: who listens takes both, and who connects takes the one that serves better.
//!
//! A byte over TLS costs less of both hosts' CPU time than one over QUIC, so TLS is tried first. It gets a head start;
//! then QUIC is tried beside it, for networks and hosts that answer only there. What answers first is what all
//! connections go over, until it fails.

use std::fmt;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::door::Door;
use crate::pki::Identity;
use crate::{
    BoxFuture, Channel, Connector, LinkError, Listener, Over, PeerRule, QuicConnector,
    QuicListener, TlsConnector, TlsListener, quic, tls,
};

/// How long TLS is tried alone: longer than it takes where it answers. A host that does not speak it says so at once.
const HEAD_START: Duration = Duration::from_secs(1);
/// Ports that are tried where any will do.
const TRIES: usize = 32;

/// Which link is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkChoice {
    /// The better one of those that answer.
    #[default]
    Auto,
    /// Just this one.
    Only(Over),
}

impl fmt::Display for LinkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Only(Over::Quic) => "quic",
            Self::Only(Over::Tls) => "tls",
        })
    }
}

impl FromStr for LinkChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Only(Over::Quic)),
            "tls" => Ok(Self::Only(Over::Tls)),
            _ => Err(format!("`{text}` is no link: write auto, quic or tls")),
        }
    }
}

/// Makes channels to one address, over QUIC or TLS.
pub struct EitherConnector {
    quic: QuicConnector,
    tls: TlsConnector,
    to: SocketAddr,
    choice: LinkChoice,
    /// What is used, and why.
    chosen: Mutex<Option<(Over, &'static str)>>,
}

impl EitherConnector {
    /// Connections to `to` over what `choice` says, as `identity`; new ones as it is then, if its files are replaced.
    ///
    /// # Errors
    /// TLS does not take the identity.
    pub fn new(identity: &Identity, to: SocketAddr, choice: LinkChoice) -> Result<Self, LinkError> {
        let chosen = match choice {
            LinkChoice::Auto => None,
            LinkChoice::Only(over) => Some((over, "as asked for")),
        };
        Ok(Self {
            quic: QuicConnector::new(identity, to)?,
            tls: TlsConnector::new(identity, to)?,
            to,
            choice,
            chosen: Mutex::new(chosen),
        })
    }

    /// Whoever is there must be `peer`; None: any host of our authority.
    #[must_use]
    pub fn to_peer(self, peer: Option<PeerRule>) -> Self {
        Self { quic: self.quic.to_peer(peer.clone()), tls: self.tls.to_peer(peer), ..self }
    }

    fn chosen(&self) -> MutexGuard<'_, Option<(Over, &'static str)>> {
        self.chosen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn by(&self, over: Over) -> Result<Channel, LinkError> {
        match over {
            Over::Quic => self.quic.connect().await,
            Over::Tls => self.tls.connect().await,
        }
    }

    /// TLS, or else QUIC.
    async fn race(&self) -> Result<(Channel, Over, &'static str), LinkError> {
        let tls = self.by(Over::Tls);
        tokio::pin!(tls);
        let failed = match tokio::time::timeout(HEAD_START, &mut tls).await {
            Ok(Ok(channel)) => return Ok((channel, Over::Tls, "it costs less than QUIC")),
            Ok(Err(e)) if !e.is_unanswered() => return Err(e),
            Ok(Err(e)) => Some(e),
            Err(_) => None,
        };
        let quic = self.by(Over::Quic);
        tokio::pin!(quic);
        let failed = match failed {
            Some(e) => e,
            None => tokio::select! {
                done = &mut tls => match done {
                    Ok(channel) => return Ok((channel, Over::Tls, "it answered before QUIC")),
                    Err(e) if !e.is_unanswered() => return Err(e),
                    Err(e) => e,
                },
                done = &mut quic => match done {
                    Ok(channel) => return Ok((channel, Over::Quic, "TCP was not answered soon")),
                    Err(quic) => {
                        return match tls.await {
                            Ok(channel) => Ok((channel, Over::Tls, "QUIC failed")),
                            Err(tls) => Err(neither(quic, tls)),
                        };
                    }
                },
            },
        };
        match quic.await {
            Ok(channel) => Ok((channel, Over::Quic, "TCP is not answered")),
            Err(quic) => Err(neither(quic, failed)),
        }
    }
}

/// What to say where both failed.
fn neither(quic: LinkError, tls: LinkError) -> LinkError {
    match (quic.is_unanswered(), tls.is_unanswered()) {
        (false, _) => quic,
        (true, false) => tls,
        (true, true) => LinkError::Neither { quic: quic.into(), tls: tls.into() },
    }
}

impl Connector for EitherConnector {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let chosen = *self.chosen();
            let Some((over, _)) = chosen else {
                let (channel, over, why) = self.race().await?;
                self.chosen().get_or_insert((over, why));
                return Ok(channel);
            };
            let done = self.by(over).await;
            if self.choice == LinkChoice::Auto && done.as_ref().is_err_and(LinkError::is_unanswered)
            {
                // The next one may find another way.
                *self.chosen() = None;
            }
            done
        })
    }

    fn describe(&self) -> String {
        match *self.chosen() {
            Some((over, why)) => format!("{over} to {} ({why})", self.to),
            None => format!("QUIC or TLS to {}", self.to),
        }
    }
}

/// A UDP and a TCP socket at one address, for what listens to both; or one of them.
pub struct Sockets {
    udp: Option<UdpSocket>,
    tcp: Option<TcpListener>,
}

impl Sockets {
    /// Takes `addr`; port 0: any that is free, the same for both.
    ///
    /// # Errors
    /// The address is in use or not this host's.
    pub fn bind(addr: SocketAddr, choice: LinkChoice) -> Result<Self, LinkError> {
        let mut tries = if addr.port() == 0 { TRIES } else { 1 };
        loop {
            tries -= 1;
            match Self::try_bind(addr, choice) {
                Err(LinkError::AddressInUse { .. }) if tries > 0 => {}
                done => return done,
            }
        }
    }

    fn try_bind(addr: SocketAddr, choice: LinkChoice) -> Result<Self, LinkError> {
        let udp = match choice {
            LinkChoice::Only(Over::Tls) => None,
            _ => Some(quic::bind(addr)?),
        };
        let of_udp = udp.as_ref().and_then(|udp| udp.local_addr().ok());
        let tcp = match choice {
            LinkChoice::Only(Over::Quic) => None,
            _ => Some(tls::bind(of_udp.unwrap_or(addr))?),
        };
        Ok(Self { udp, tcp })
    }

    /// Listens, as `identity`; if its files are replaced, for new connections as it is then. Connections are driven by
    /// the tokio runtime of the caller.
    ///
    /// # Errors
    /// TLS does not take the identity.
    pub fn listen(self, identity: &Identity) -> Result<EitherListener, LinkError> {
        let door = Door::new();
        let quic = self.udp.map(|udp| QuicListener::on(udp, identity, door.clone())).transpose()?;
        let tls = self.tcp.map(|tcp| TlsListener::on(tcp, identity, door)).transpose()?;
        Ok(EitherListener { quic, tls })
    }
}

/// Takes channels in over QUIC and TLS; their handshakes have the same limits together.
pub struct EitherListener {
    quic: Option<QuicListener>,
    tls: Option<TlsListener>,
}

async fn next<L: Listener>(listener: &mut Option<L>) -> Result<Channel, LinkError> {
    if let Some(there) = listener {
        if let Some(accepted) = there.accept().await {
            return accepted;
        }
        *listener = None;
    }
    std::future::pending().await
}

impl Listener for EitherListener {
    fn accept(&mut self) -> BoxFuture<'_, Option<Result<Channel, LinkError>>> {
        Box::pin(async {
            tokio::select! {
                accepted = next(&mut self.quic) => Some(accepted),
                accepted = next(&mut self.tls) => Some(accepted),
            }
        })
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        let quic = self.quic.as_ref().and_then(Listener::local_addr);
        quic.or_else(|| self.tls.as_ref().and_then(Listener::local_addr))
    }
}
