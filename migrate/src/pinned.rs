//! The source's connections all lead to one host: the first one that answered.
//!
//! Another host of the same authority, at that address later or on another lane, learns nothing of the session: it
//! could else say that the machine never ran.

use std::sync::{Arc, Mutex, PoisonError};

use ferry_transport::{BoxFuture, Channel, Connector, LinkError};

/// Leads to the host that its first channel led to, by the name in its certificate.
pub(crate) struct Pinned {
    to: Arc<dyn Connector>,
    peer: Mutex<Option<String>>,
}

impl Pinned {
    /// As `to`; `peer` is the host, if that is known.
    pub(crate) fn new(to: Arc<dyn Connector>, peer: Option<String>) -> Self {
        Self { to, peer: Mutex::new(peer) }
    }

    /// Where it leads, once that is known.
    pub(crate) fn peer(&self) -> Option<String> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Connector for Pinned {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let mut channel = self.to.connect().await?;
            let wanted = {
                let mut peer = self.peer.lock().unwrap_or_else(PoisonError::into_inner);
                peer.get_or_insert_with(|| channel.peer.name.clone()).clone()
            };
            if wanted == channel.peer.name {
                return Ok(channel);
            }
            channel.sink.close("this host is not the one that the machine goes to").await;
            let (remote, found) = (channel.remote, channel.peer.to_string());
            Err(LinkError::OtherPeer { remote, found, wanted })
        })
    }

    fn describe(&self) -> String {
        self.to.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_transport::memory;

    /// Leads to one host, then to another.
    struct Swapped(Mutex<Vec<&'static str>>);

    impl Connector for Swapped {
        fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
            Box::pin(async {
                let (mut channel, other) = memory::channel(1);
                std::mem::forget(other);
                channel.peer.name = self.0.lock().unwrap().remove(0).to_owned();
                Ok(channel)
            })
        }

        fn describe(&self) -> String {
            String::new()
        }
    }

    #[tokio::test]
    async fn a_host_that_takes_the_destinations_place_is_told_nothing() {
        let pinned = Pinned::new(Arc::new(Swapped(Mutex::new(vec!["a", "a", "b", "a"]))), None);
        assert_eq!(pinned.connect().await.unwrap().peer.name, "a");
        pinned.connect().await.unwrap();
        let said = pinned.connect().await.unwrap_err();
        assert!(matches!(&said, LinkError::OtherPeer { wanted, .. } if wanted == "a"), "{said}");
        pinned.connect().await.unwrap();
        let again = Pinned::new(Arc::new(Swapped(Mutex::new(vec!["b"]))), pinned.peer());
        again.connect().await.unwrap_err();
    }
}
