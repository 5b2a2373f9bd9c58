//! Several ways to one host, used side by side: bonded links without a bond.
//!
//! Each connection takes the next way, so that those of one migration spread over all of them; what a slow way does
//! not carry, the others do, since lanes take work as they get rid of it. A way that does not answer is tried last
//! for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{BoxFuture, Channel, Connector, LinkError};

/// A way that failed is tried after all others for so long.
const REST: Duration = Duration::from_secs(30);

/// Makes channels to one host by several ways.
pub struct Paths(Mutex<State>);

struct State {
    ways: Vec<Way>,
    /// The way that the next connection takes.
    turn: usize,
    /// The host's name, once that is known.
    host: Option<String>,
}

struct Way {
    to: Arc<dyn Connector>,
    /// When it failed last, and why; none since it served.
    failed: Option<(Instant, LinkError)>,
}

impl Paths {
    /// By all of `ways`, the first of which makes the first connection.
    pub fn new(ways: impl IntoIterator<Item = Arc<dyn Connector>>) -> Self {
        let ways = ways.into_iter().map(|to| Way { to, failed: None }).collect();
        Self(Mutex::new(State { ways, turn: 0, host: None }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The order in which this connection tries them.
    fn order(&self) -> Vec<(usize, Arc<dyn Connector>)> {
        let mut state = self.state();
        let count = state.ways.len();
        let first = state.turn;
        state.turn = (first + 1) % count.max(1);
        let mut order: Vec<usize> = (0..count).map(|n| (first + n) % count).collect();
        let failed =
            |n: &usize| state.ways[*n].failed.as_ref().is_some_and(|(at, _)| at.elapsed() < REST);
        order.sort_by_key(failed);
        order.into_iter().map(|n| (n, state.ways[n].to.clone())).collect()
    }

    /// `channel`, if it leads to the host that the others lead to.
    async fn of_this_host(&self, mut channel: Channel) -> Result<Channel, LinkError> {
        let wanted = {
            let mut state = self.state();
            state.host.get_or_insert_with(|| channel.peer.name.clone()).clone()
        };
        if channel.peer.name == wanted {
            return Ok(channel);
        }
        channel.sink.close("this host is not the one at the other addresses").await;
        let (remote, found) = (channel.remote, channel.peer.to_string());
        Err(LinkError::OtherPeer { remote, found, wanted })
    }
}

impl Connector for Paths {
    fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
        Box::pin(async {
            let mut failed = Vec::new();
            for (number, way) in self.order() {
                let connected = match way.connect().await {
                    Ok(channel) => self.of_this_host(channel).await,
                    Err(e @ LinkError::OtherPeer { .. }) => Err(e),
                    // No other way would do better.
                    Err(e) if !e.is_unanswered() => return Err(e),
                    Err(e) => Err(e),
                };
                let failure = connected.as_ref().err().map(|e| (Instant::now(), e.clone()));
                self.state().ways[number].failed = failure;
                match connected {
                    Ok(channel) => return Ok(channel),
                    Err(e) => failed.push(e),
                }
            }
            match (failed.pop(), failed.is_empty()) {
                (Some(only), true) => Err(only),
                (last, _) => {
                    failed.extend(last);
                    Err(LinkError::NoWay { of: failed })
                }
            }
        })
    }

    fn describe(&self) -> String {
        let state = self.state();
        let mut ways: Vec<&Way> = state.ways.iter().collect();
        ways.sort_by_key(|way| way.failed.is_some());
        let words = ways.into_iter().map(|way| match &way.failed {
            None => way.to.describe(),
            Some((_, why)) => format!("not {}: {why}", way.to.describe()),
        });
        words.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::memory;

    /// Leads to `host`, if it is up.
    struct Path {
        name: &'static str,
        host: &'static str,
        up: AtomicBool,
    }

    impl Connector for Path {
        fn connect(&self) -> BoxFuture<'_, Result<Channel, LinkError>> {
            Box::pin(async {
                if !self.up.load(Ordering::Relaxed) {
                    return Err(LinkError::Lost { remote: self.name.into(), why: "down".into() });
                }
                if self.host == "unwanted" {
                    let (found, wanted) = (self.host.into(), "host".into());
                    return Err(LinkError::OtherPeer { remote: self.name.into(), found, wanted });
                }
                let (mut channel, other) = memory::channel(1);
                std::mem::forget(other);
                (channel.peer.name, channel.remote) = (self.host.into(), self.name.into());
                Ok(channel)
            })
        }

        fn describe(&self) -> String {
            self.name.into()
        }
    }

    fn paths(of: [(&'static str, &'static str); 3]) -> (Paths, Vec<Arc<Path>>) {
        let all = of.map(|(name, host)| Arc::new(Path { name, host, up: AtomicBool::new(true) }));
        let paths = Paths::new(all.iter().map(|path| path.clone() as Arc<dyn Connector>));
        (paths, all.into())
    }

    async fn taken(paths: &Paths, times: usize) -> Vec<String> {
        let mut taken = Vec::new();
        for _ in 0..times {
            taken.push(paths.connect().await.map_or_else(|e| e.to_string(), |c| c.remote));
        }
        taken
    }

    #[tokio::test]
    async fn connections_spread_over_the_ways_that_lead_there() {
        let (paths, all) = paths([("a", "host"), ("b", "host"), ("c", "host")]);
        assert_eq!(taken(&paths, 5).await, ["a", "b", "c", "a", "b"]);
        all[2].up.store(false, Ordering::Relaxed);
        // In the place of the one that failed, the next; and from then on, it is the last.
        assert_eq!(taken(&paths, 4).await, ["a", "a", "b", "a"]);
        assert!(paths.describe().starts_with("a; b; not c: "), "{}", paths.describe());
        all.iter().for_each(|path| path.up.store(false, Ordering::Relaxed));
        let why = paths.connect().await.unwrap_err();
        assert!(matches!(&why, LinkError::NoWay { of } if of.len() == 3), "{why}");
        all[2].up.store(true, Ordering::Relaxed);
        assert_eq!(taken(&paths, 2).await, ["c", "c"]);
    }

    #[tokio::test]
    async fn an_address_of_another_host_is_not_used() {
        // Whether it is known beforehand who must be there, or not.
        for other in ["stranger", "unwanted"] {
            let (paths, _) = paths([("a", "host"), ("b", other), ("c", "host")]);
            assert_eq!(taken(&paths, 4).await, ["a", "c", "c", "a"]);
            assert!(paths.describe().contains("not b: b is host "), "{}", paths.describe());
        }
    }
}
