//! What is measured: guests, links, and the settings of QEMU that are tried.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A guest, and how it is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// For the reader.
    pub(crate) what: &'static str,
    pub(crate) memory_mib: u64,
    /// The test guest's command line.
    pub(crate) workload: &'static str,
    pub(crate) kind: Kind,
    /// Whether `quick` includes it.
    pub(crate) quick: bool,
}

/// What a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The guest writes next to nothing.
    Quiet,
    /// It writes a working set.
    Busy,
    /// It is handed over first, and its pages follow: how long it waits for them.
    PostCopy,
}

/// A guest that does next to nothing: it wakes every millisecond, so that its standing still is seen.
macro_rules! quiet {
    ($more:literal) => {
        concat!("pattern=working-set set=4K rate=100 fill=all ", $more)
    };
}

macro_rules! case {
    ($name:literal, $what:literal, $mib:literal, $workload:expr, $kind:ident, $quick:literal) => {
        Case {
            name: $name,
            what: $what,
            memory_mib: $mib,
            workload: $workload,
            kind: Kind::$kind,
            quick: $quick,
        }
    };
}

pub(crate) const CASES: &[Case] = &[
    case!(
        "idle",
        "idle, 0.5 GiB, a quarter of each page random",
        512,
        quiet!("arena=480M random=25"),
        Quiet,
        true
    ),
    case!(
        "set",
        "64 MiB rewritten at 10,000 pages/s, 0.5 GiB, a quarter random",
        512,
        "pattern=working-set set=64M rate=10000 arena=480M fill=all random=25",
        Busy,
        true
    ),
    case!(
        "fast",
        "256 MiB rewritten as fast as it can, 0.5 GiB, a quarter random",
        512,
        "pattern=working-set set=256M arena=480M fill=all random=25",
        Busy,
        true
    ),
    case!(
        "reads",
        "random reads over everything, 0.5 GiB, a quarter random",
        512,
        "pattern=random-read arena=480M fill=all random=25",
        Busy,
        false
    ),
    case!(
        "reads-postcopy",
        "random reads over everything, 0.5 GiB, a quarter random, post-copy",
        512,
        "pattern=random-read arena=480M fill=all random=25",
        PostCopy,
        true
    ),
    case!(
        "writes-postcopy",
        "random writes over everything, 0.5 GiB, all random, post-copy",
        512,
        "pattern=random arena=480M fill=all random=100",
        PostCopy,
        false
    ),
    case!(
        "zero",
        "idle, 0.5 GiB of zeros",
        512,
        "pattern=working-set set=4K rate=100 fill=zeros arena=480M random=0",
        Quiet,
        false
    ),
    case!(
        "text",
        "idle, 0.5 GiB of text",
        512,
        quiet!("arena=480M random=0 rest=text"),
        Quiet,
        true
    ),
    case!(
        "random",
        "idle, 0.5 GiB, all random",
        512,
        quiet!("arena=480M random=100"),
        Quiet,
        false
    ),
    case!(
        "idle-2g",
        "idle, 2 GiB, a quarter random",
        2048,
        quiet!("arena=1920M random=25"),
        Quiet,
        false
    ),
    case!(
        "idle-8g",
        "idle, 8 GiB, a quarter random",
        8192,
        quiet!("arena=7680M random=25"),
        Quiet,
        false
    ),
    case!(
        "full-1g",
        "idle, 1 GiB, all of it touched, a quarter random",
        1024,
        quiet!("arena=1000M random=25"),
        Quiet,
        false
    ),
    case!(
        "sparse-8g",
        "idle, 8 GiB, 1000 MiB of it touched, a quarter random",
        8192,
        quiet!("arena=1000M random=25"),
        Quiet,
        false
    ),
];

/// What joins the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    /// What it lets through; none for as much as the machine can.
    pub(crate) bits_per_s: Option<u64>,
    /// The rate as `tc` is told.
    pub(crate) tc: &'static str,
    /// What the cable takes for there and back; 0 for what it is.
    pub(crate) round_trip_ms: u64,
    pub(crate) quick: bool,
}

pub(crate) const LINKS: &[Link] = &[
    Link {
        name: "loopback",
        what: "loopback",
        bits_per_s: None,
        tc: "",
        round_trip_ms: 0,
        quick: true,
    },
    Link {
        name: "1g",
        what: "1 Gbit/s",
        bits_per_s: Some(1_000_000_000),
        tc: "1gbit",
        round_trip_ms: 0,
        quick: true,
    },
    Link {
        name: "far",
        what: "1 Gbit/s with a round trip of 50 ms",
        bits_per_s: Some(1_000_000_000),
        tc: "",
        round_trip_ms: 50,
        quick: false,
    },
    Link {
        name: "10g",
        what: "10 Gbit/s",
        bits_per_s: Some(10_000_000_000),
        tc: "10gbit",
        round_trip_ms: 0,
        quick: false,
    },
];

/// The case or link of this name.
pub(crate) fn case(name: &str) -> Option<&'static Case> {
    CASES.iter().find(|c| c.name == name)
}

pub(crate) fn link(name: &str) -> Option<&'static Link> {
    LINKS.iter().find(|l| l.name == name)
}

/// How long a move may take before it counts as not ending: thrice what the slowest link needs for all of it.
pub(crate) fn patience(case: &Case) -> Duration {
    Duration::from_secs(30 + case.memory_mib / 40)
}

/// How QEMU moves a guest. What is not here is at its default, but for `max-bandwidth`, which is at its most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Setting {
    pub(crate) tls: bool,
    /// Connections of multifd; 0 without it.
    pub(crate) channels: u8,
    pub(crate) zstd: bool,
    pub(crate) xbzrle: bool,
    pub(crate) auto_converge: bool,
    /// Post-copy with preempt, begun at once.
    pub(crate) post_copy: bool,
    /// `downtime-limit`: QEMU's default is 300.
    pub(crate) downtime_ms: u64,
}

impl Setting {
    pub(crate) const PLAIN: Self = Self {
        tls: false,
        channels: 0,
        zstd: false,
        xbzrle: false,
        auto_converge: false,
        post_copy: false,
        downtime_ms: 300,
    };

    /// In words, without whether it is encrypted.
    pub(crate) fn words(&self) -> String {
        let mut words = Vec::new();
        if self.channels > 0 {
            words.push(format!("multifd {}", self.channels));
        }
        for (on, word) in [
            (self.zstd, "zstd"),
            (self.xbzrle, "xbzrle"),
            (self.auto_converge, "auto-converge"),
            (self.post_copy, "post-copy + preempt"),
        ] {
            if on {
                words.push(word.into());
            }
        }
        if words.is_empty() {
            words.push("default".into());
        }
        if self.downtime_ms != Self::PLAIN.downtime_ms {
            words.push(format!("downtime-limit {} ms", self.downtime_ms));
        }
        words.join(", ")
    }
}

/// The settings that make sense for a case, plain ones first; fewer if `quick`.
pub(crate) fn candidates(kind: Kind, quick: bool) -> Vec<Setting> {
    let plain = Setting::PLAIN;
    let multifd = |channels, zstd| Setting { channels, zstd, ..plain };
    let mut all = match (kind, quick) {
        (Kind::PostCopy, _) => Vec::new(),
        (Kind::Busy, true) => [false, true].map(|zstd| multifd(2, zstd)).into(),
        (Kind::Quiet, true) => [(false, 300), (true, 300), (false, 20), (true, 20)]
            .map(|(zstd, downtime_ms)| Setting { downtime_ms, ..multifd(2, zstd) })
            .into(),
        (_, false) => {
            let mut all = vec![plain];
            for zstd in [false, true] {
                all.extend([1, 2, 4].map(|channels| multifd(channels, zstd)));
            }
            all.extend([false, true].map(|zstd| Setting { downtime_ms: 20, ..multifd(2, zstd) }));
            all
        }
    };
    if kind == Kind::Busy {
        all.push(Setting { auto_converge: true, ..multifd(2, true) });
        all.push(Setting { post_copy: true, ..plain });
        if !quick {
            all.push(Setting { xbzrle: true, ..plain });
            all.push(Setting { xbzrle: true, auto_converge: true, ..plain });
            all.push(Setting { auto_converge: true, ..multifd(2, false) });
            all.push(Setting { auto_converge: true, ..multifd(4, true) });
        }
    }
    if kind == Kind::PostCopy {
        all.push(Setting { post_copy: true, ..plain });
    }
    let tls = all.clone().into_iter().map(|s| Setting { tls: true, ..s });
    all.into_iter().chain(tls).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use ferry_guest::workload::Params;

    use super::*;

    #[test]
    fn every_case_has_its_own_name_a_workload_that_the_guest_takes_and_room_for_it() {
        let names: HashSet<_> = CASES.iter().map(|c| c.name).collect();
        assert_eq!(names.len(), CASES.len());
        for case in CASES {
            let params = Params::parse(case.workload).unwrap();
            let room = (case.memory_mib << 20) - (8 << 20);
            assert!(params.arena_bytes > 0 && params.arena_bytes < room, "{}", case.name);
            assert!(params.fill, "{}: what is moved is known", case.name);
        }
    }

    #[test]
    fn every_setting_is_tried_plain_and_encrypted_once_and_none_that_qemu_refuses() {
        for kind in [Kind::Quiet, Kind::Busy, Kind::PostCopy] {
            for quick in [false, true] {
                let all = candidates(kind, quick);
                let names: HashSet<_> = all.iter().map(|s| (s.tls, s.words())).collect();
                assert_eq!(names.len(), all.len());
                assert_eq!(all.iter().filter(|s| s.tls).count() * 2, all.len());
                for s in all {
                    assert!(!s.zstd || s.channels > 0, "zstd is multifd's");
                    assert!(s.channels == 0 || !s.xbzrle && !s.post_copy);
                }
            }
        }
    }
}
