//! Where a machine goes: one host, at one address or at several.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::sync::Arc;

use ferry_transport::{
    Connector, EitherConnector, Identity, LinkChoice, LinkError, Paths, PeerRule,
};
use serde::{Deserialize, Serialize};

/// More links between two hosts there are not.
const MOST: usize = 16;

/// The addresses of one host, at least one, each once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Route(Vec<SocketAddr>);

impl Route {
    fn new(addresses: Vec<SocketAddr>) -> Result<Self, String> {
        if addresses.len() > MOST {
            return Err(format!("{} addresses; there may be {MOST}", addresses.len()));
        }
        let twice = (1..addresses.len()).find(|n| addresses[..*n].contains(&addresses[*n]));
        match twice {
            Some(n) => Err(format!("{} is named twice", addresses[n])),
            None => Ok(Self(addresses)),
        }
    }

    /// How many addresses.
    pub(crate) fn len(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }

    /// Makes connections to it as `identity`, over `link`; `peer` must be there.
    pub(crate) fn connector(
        &self,
        identity: &Identity,
        link: LinkChoice,
        peer: Option<&PeerRule>,
    ) -> Result<Arc<dyn Connector>, LinkError> {
        let to = |addr: &SocketAddr| {
            let connector = EitherConnector::new(identity, *addr, link)?.to_peer(peer.cloned());
            Ok(Arc::new(connector) as Arc<dyn Connector>)
        };
        let mut ways = self.0.iter().map(to).collect::<Result<Vec<_>, LinkError>>()?;
        match ways.len() {
            1 => Ok(ways.remove(0)),
            _ => Ok(Arc::new(Paths::new(ways))),
        }
    }
}

impl From<SocketAddr> for Route {
    fn from(addr: SocketAddr) -> Self {
        Self(vec![addr])
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, addr) in self.0.iter().enumerate() {
            write!(f, "{}{addr}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Route {
    type Err = String;

    /// Addresses or names of hosts, each with a port, with commas in between.
    fn from_str(text: &str) -> Result<Self, String> {
        Self::new(text.split(',').map(address).collect::<Result<_, _>>()?)
    }
}

impl TryFrom<String> for Route {
    type Error = String;

    /// Addresses, as [`Display`](fmt::Display) writes them.
    fn try_from(text: String) -> Result<Self, String> {
        let parse = |part: &str| part.parse().map_err(|e| format!("`{part}`: {e}"));
        Self::new(text.split(',').map(parse).collect::<Result<_, _>>()?)
    }
}

impl From<Route> for String {
    fn from(route: Route) -> Self {
        route.to_string()
    }
}

/// An address such as `10.0.0.2:7000`, or a host's name and a port.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().map_err(|e| e.to_string());
    found
        .and_then(|mut all| all.next().ok_or_else(|| "the name has no address".into()))
        .map_err(|why| format!("{why}; write HOST:PORT, such as 10.0.0.2:7000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_as_they_are_read() {
        for text in ["10.0.0.2:7000", "10.0.0.2:7000,[::1]:7000,10.0.0.2:7001"] {
            let route: Route = text.parse().expect("addresses");
            assert_eq!(route.to_string(), text);
            assert_eq!(Route::try_from(text.to_owned()).as_ref(), Ok(&route));
        }
        let many = (0..17).map(|n| format!("10.0.0.2:{n}")).collect::<Vec<_>>().join(",");
        for (text, words) in [
            ("", "HOST:PORT"),
            ("10.0.0.2:7000,", "HOST:PORT"),
            ("10.0.0.2:7000,10.0.0.2:7000", "10.0.0.2:7000 is named twice"),
            (&many, "17 addresses; there may be 16"),
        ] {
            let why = text.parse::<Route>().expect_err("refused");
            assert!(why.contains(words), "{text}: {why}");
            Route::try_from(text.to_owned()).expect_err("refused");
        }
    }
}
