//! Allow lists: a line lets a host do what it says, and no line lets anybody do more.

use ferry_transport::{AllowList, Fingerprint, Peer, PeerRule};

/// Text of a list.
pub fn allow(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let list: AllowList = match text.parse() {
        Ok(list) => list,
        Err(why) => return assert!(why.starts_with("line "), "{why}"),
    };
    let rules = text.lines().filter_map(|line| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        Some((words.next()?.parse::<PeerRule>().ok()?, words.collect::<Vec<_>>()))
    });
    let rules: Vec<_> = rules.collect();
    // A name that no line can have.
    const NOBODY: &str = "a b";
    let strange = Fingerprint::of(b"of nobody's certificate");
    let name = |name: &str| Peer { name: name.to_owned(), fingerprint: strange };
    for (who, what) in &rules {
        let peer = match who {
            PeerRule::Name(host) => name(host),
            PeerRule::Fingerprint(fingerprint) => {
                Peer { name: NOBODY.into(), fingerprint: *fingerprint }
            }
        };
        assert!(list.knows(&peer), "{who}");
        assert!(what.iter().all(|what| list.allows(&peer, what)), "{who}: {what:?}");
        let all = rules.iter().any(|(who, what)| who.fits(&peer) && what.contains(&"*"));
        assert_eq!(list.allows(&peer, "a name that no line can have"), all, "{who}");
    }
    assert!(!list.knows(&name(NOBODY)));
}
