//! Bundles of this host and of others: opens them, and lends them.

use std::io;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_bundle::Chain;
use ferry_depot::{Depot, DepotEvent, Network, PATIENCE, serve};
use ferry_migrate::words;
use ferry_transport::{Connector, EitherConnector, Identity, Listener, Sockets};

use crate::Failure;
use crate::args::{BundleServe, PeerArg, Places};

/// Opens the bundle at `dir`, wherever it and its bases lie.
pub(crate) fn open(dir: &Path, places: &Places) -> Result<Chain, Failure> {
    let (identity, peer) = (places.identity.clone(), places.peer.clone());
    let connect = move |address: &str| connector(address, identity.as_ref(), &peer);
    let network = Network::new(connect, PATIENCE);
    Ok(Chain::open_on(&network, dir, &places.bases)?)
}

fn connector(
    address: &str,
    identity: Option<&PathBuf>,
    peer: &PeerArg,
) -> io::Result<Arc<dyn Connector>> {
    let identity = identity.ok_or_else(|| {
        io::Error::other("another host wants to know who reads: say --identity DIR")
    })?;
    let identity = Identity::load(identity).map_err(|e| io::Error::other(words(&e)))?;
    let wrong = |why: String| {
        io::Error::other(format!(
            "{why}; write ferry://HOST:PORT/NAME, such as ferry://10.0.0.2:7001/b"
        ))
    };
    let mut found = address.to_socket_addrs().map_err(|e| wrong(e.to_string()))?;
    let to = found.next().ok_or_else(|| wrong("the name has no address".into()))?;
    let connector =
        EitherConnector::new(&identity, to, peer.link).map_err(|e| io::Error::other(words(&e)))?;
    Ok(Arc::new(connector.to_peer(peer.peer.clone())))
}

pub(crate) fn lend(args: &BundleServe) -> Result<(), Failure> {
    let identity = crate::load_identity(&args.identity)?;
    let admission = crate::allowed(args.allow.as_ref())?;
    let depot = Depot::open(&args.dir).map_err(|e| {
        Failure::words(format!("cannot lend bundles of {}: {e}", args.dir.display()))
    })?;
    let depot = depot.lend_to(admission);
    // Before: a confined process makes no socket for TCP.
    let sockets = Sockets::bind(args.listen.addr, args.listen.link)?;
    let confined = crate::confine::lender(args)?;
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    tokio.block_on(async {
        let listener = sockets.listen(&identity)?;
        let addr = listener.local_addr().unwrap_or(args.listen.addr);
        let dir = args.dir.display();
        let name = identity.name();
        eprintln!("ferry: lending the bundles of {dir} on {addr} as `{name}`, {confined}");
        let args = args.clone();
        let tell = move |event| match event {
            DepotEvent::Reads { peer, bundle } => {
                eprintln!("ferry: {peer} reads {}", args.dir.join(bundle).display());
            }
            DepotEvent::Turned(why) => eprintln!("ferry: {why}"),
        };
        serve(Box::new(listener), depot, tell).await;
        Ok(())
    })
}
