//! Allow lists: which peers may do something with which machine or bundle.
//!
//! ```text
//! # who                what
//! host1                *
//! host2                web1 web2
//! sha256:3f2a…         db1
//! ```
//! A line for each rule: a host's name or its certificate's fingerprint, then names, or `*` for all. A name of a
//! directory of bundles means all that are in it.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Peer, PeerRule};

/// No allow list is larger than this.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// All there is.
const ALL: &str = "*";

/// Who may do what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<(PeerRule, Vec<String>)>);

impl FromStr for AllowList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rules = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(who) = words.next() else { continue };
            let who = who.parse().map_err(|e| format!("line {number}: {e}"))?;
            let what: Vec<String> = words.map(str::to_owned).collect();
            if what.is_empty() {
                return Err(format!("line {number}: `{who}` is followed by no name, nor by `*`"));
            }
            if let Some(name) = what.iter().find(|name| name.contains(ALL) && *name != ALL) {
                return Err(format!("line {number}: `{name}`: `*` stands alone, and means all"));
            }
            rules.push((who, what));
        }
        Ok(Self(rules))
    }
}

impl AllowList {
    /// Whether there is anything that `peer` may do.
    pub fn knows(&self, peer: &Peer) -> bool {
        self.0.iter().any(|(who, _)| who.fits(peer))
    }

    /// Whether `peer` may have to do with `name`.
    pub fn allows(&self, peer: &Peer, name: &str) -> bool {
        let within = |dir: &str| name.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'));
        let means = |what: &String| what == ALL || what == name || within(what);
        self.0.iter().any(|(who, what)| who.fits(peer) && what.iter().any(means))
    }
}

/// Whom a host lets do something.
#[derive(Clone, Debug, Default)]
pub enum Admission {
    /// Every peer with a certificate of the authority, everything.
    #[default]
    Everyone,
    /// Whoever is on the list.
    List(AllowList),
    /// Whoever is on the list in this file, which is read each time: who may do what can be changed at any time.
    /// While it cannot be read, nobody is let in.
    File(PathBuf),
}

impl Admission {
    /// Whether `peer` may do anything at all.
    ///
    /// # Errors
    /// It may not, or nobody may at present, in words for both sides.
    pub fn knows(&self, peer: &Peer) -> Result<(), String> {
        match self.list()? {
            Some(list) if !list.knows(peer) => Err(refusal(peer, "do anything here", "NAME")),
            _ => Ok(()),
        }
    }

    /// Whether `peer` may `act` (such as `send machine`) upon `name`.
    ///
    /// # Errors
    /// As [`knows`](Self::knows).
    pub fn admit(&self, peer: &Peer, act: &str, name: &str) -> Result<(), String> {
        match self.list()? {
            Some(list) if !list.allows(peer, name) => {
                // A peer chose the name.
                let name = name.escape_debug().take(80).collect::<String>();
                Err(refusal(peer, &format!("{act} `{name}`"), &name))
            }
            _ => Ok(()),
        }
    }

    /// The list as it is now; none where there is none.
    ///
    /// # Errors
    /// The file cannot be read, or is no list.
    pub fn list(&self) -> Result<Option<AllowList>, String> {
        let path = match self {
            Self::Everyone => return Ok(None),
            Self::List(list) => return Ok(Some(list.clone())),
            Self::File(path) => path,
        };
        let read = || {
            let mut text = String::new();
            File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        let mended = "nobody is let in until that is mended";
        let text = read().map_err(|e: std::io::Error| {
            format!("the allow list {} cannot be read ({e}): {mended}", path.display())
        })?;
        if text.len() as u64 > MAX_FILE_BYTES {
            let mib = MAX_FILE_BYTES >> 20;
            return Err(format!("the allow list {} has over {mib} MiB: {mended}", path.display()));
        }
        let list = text.parse();
        list.map(Some).map_err(|e| format!("the allow list {}, {e}: {mended}", path.display()))
    }
}

fn refusal(peer: &Peer, what: &str, name: &str) -> String {
    format!(
        "host {peer} may not {what}: no line of this host's allow list (--allow) says so; the line `{} {name}` would",
        peer.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Fingerprint;

    fn peer(name: &str) -> Peer {
        Peer { name: name.into(), fingerprint: Fingerprint::of(name.as_bytes()) }
    }

    #[test]
    fn who_may_do_what_is_what_the_lines_say_and_no_more() {
        let four = peer("host4").fingerprint;
        let text =
            format!("# hosts\nhost1 *\n\nhost2 web1 web2 # two\nhost2 db\nHOST3 web1\n{four} x");
        let list: AllowList = text.parse().unwrap();
        for (who, what, allowed) in [
            ("host1", "anything", true),
            ("host2", "web1", true),
            ("host2", "web2", true),
            ("host2", "db", true),
            ("host2", "db/monday", true),
            ("host2", "database", false),
            ("host2", "web3", false),
            ("host2", "", false),
            ("host2", "*", false),
            ("host3", "web1", false),
            ("host4", "x", true),
            ("host4", "web1", false),
            ("host5", "web1", false),
            ("#", "hosts", false),
        ] {
            assert_eq!(list.allows(&peer(who), what), allowed, "{who} {what}");
        }
        assert!(list.knows(&peer("host4")) && !list.knows(&peer("host5")));
        assert!(!AllowList::default().knows(&peer("host1")), "an empty list allows nobody");
    }

    #[test]
    fn a_line_that_is_no_rule_is_named() {
        for (text, word) in [
            ("host1 *\nhost2", "line 2: `host2` is followed by no name"),
            ("sha256:abc *", "line 1: `sha256:abc`"),
            ("* web1", "line 1"),
            ("host1 web*", "`web*`"),
        ] {
            let error = text.parse::<AllowList>().unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_list_that_is_changed_counts_at_once_and_a_broken_one_lets_nobody_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("allow");
        let admission = Admission::File(path.clone());
        let asked = || admission.admit(&peer("host1"), "send machine", "web1");
        assert!(asked().unwrap_err().contains("cannot be read"));
        std::fs::write(&path, "host1 web1").unwrap();
        asked().unwrap();
        std::fs::write(&path, "host1 web2").unwrap();
        let why = asked().unwrap_err();
        let fingerprint = peer("host1").fingerprint.to_string();
        for word in ["`host1`", &fingerprint, "send machine `web1`", "the line `host1 web1`"] {
            assert!(why.contains(word), "{word}: {why}");
        }
        std::fs::write(&path, "host1 *\nhost1").unwrap();
        let why = asked().unwrap_err();
        assert!(why.contains("line 2") && why.contains("until that is mended"), "{why}");
        std::fs::write(&path, vec![b'#'; 2 << 20]).unwrap();
        assert!(asked().unwrap_err().contains("over 1 MiB"));
        Admission::Everyone.admit(&peer("host1"), "send machine", "web1").unwrap();
    }

    #[test]
    fn a_name_that_a_peer_chose_cannot_fill_the_log_or_draw_on_the_terminal() {
        let list = Admission::List(AllowList::default());
        let why = list.admit(&peer("a"), "send machine", &"\u{1b}[2J\n".repeat(99)).unwrap_err();
        assert!(why.len() < 500 && !why.contains(['\u{1b}', '\n']), "{why}");
    }
}
