//! The workload's parameters, as words of a kernel command line.

use core::fmt;

use super::PAGE_BYTES;

/// The order in which a vCPU visits its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One page after the other, over and over.
    Sequential,
    /// Any page of the arena, all equally likely.
    Random,
    /// Any page of the first `set` bytes.
    WorkingSet,
    /// Any page of `set` bytes that move on through the arena, so that memory grows cold behind them.
    MovingSet,
    /// No visit after the fill.
    Idle,
    /// One page after the other, only checked. Pages never written are passed over untouched.
    Read,
    /// Any page of the arena, only checked, as `Read` does.
    RandomRead,
}

impl Pattern {
    const NAMES: [(&'static str, Self); 7] = [
        ("sequential", Self::Sequential),
        ("random", Self::Random),
        ("working-set", Self::WorkingSet),
        ("moving-set", Self::MovingSet),
        ("idle", Self::Idle),
        ("read", Self::Read),
        ("random-read", Self::RandomRead),
    ];

    /// Whether it writes no page.
    pub fn only_checks(self) -> bool {
        matches!(self, Self::Read | Self::RandomRead)
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, p)| *p == self).map_or("?", |(name, _)| name)
    }
}

/// What the guest does. [`Params::parse`] says what is left out by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// vCPUs (worker threads of the process guest).
    pub cpus: u32,
    /// Order of visits.
    pub pattern: Pattern,
    /// Bytes of the arena; 0 for all memory that is left.
    pub arena_bytes: u64,
    /// Bytes of the working set, over all vCPUs.
    pub set_bytes: u64,
    /// Visits of a page, on average, before the moving set leaves it behind; not 0.
    pub dwell: u64,
    /// Pages visited in a second, over all vCPUs; 0 for as fast as it can.
    pub rate: u64,
    /// Share of a page's words that is pseudo-random, in percent. The rest repeats one word.
    pub random_percent: u32,
    /// The rest is like a log's text instead.
    pub text: bool,
    /// Whether every page of the arena is written once before the pattern begins.
    pub fill: bool,
    /// The fill writes zeros.
    pub fill_zeros: bool,
    /// As `random_percent`, for the fill.
    pub fill_random_percent: u32,
    /// Frequency of the vCPUs' time-stamp counter; 0 for what CPUID says.
    pub tsc_khz: u64,
    /// Makes the content of two guests differ. With one seed, a page at a version is the same in each.
    pub seed: u64,
    /// Share of the arena, in percent, that differs in no two guests whatever their seeds: the first
    /// pages of each 16 MiB.
    pub shared_percent: u32,
}

/// A word of the command line that is not a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadParam<'a> {
    /// The word.
    pub word: &'a str,
    /// What it should be.
    pub why: &'static str,
}

impl fmt::Display for BadParam<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest parameter '{}': {}", self.word, self.why)
    }
}

impl core::error::Error for BadParam<'_> {}

const KNOWN: &str = "unknown; parameters are cpus pattern arena set dwell rate random rest fill fill_random \
     tsc_khz seed shared";
const SIZE: &str = "must be bytes, with K, M or G if wanted, in whole pages of 4096 bytes";
const NUMBER: &str = "must be a number";

impl Params {
    /// No guest has more vCPUs than this.
    pub const MAX_CPUS: u32 = 32;
    /// Page indices are 32 bits wide in a stamp.
    pub const MAX_ARENA_BYTES: u64 = PAGE_BYTES << 32;

    /// What an empty command line means.
    pub const DEFAULT: Self = Self {
        cpus: 1,
        pattern: Pattern::Sequential,
        arena_bytes: 0,
        set_bytes: 64 << 20,
        dwell: 16,
        rate: 0,
        random_percent: 50,
        text: false,
        fill: false,
        fill_zeros: false,
        fill_random_percent: 50,
        tsc_khz: 0,
        seed: 1,
        shared_percent: 0,
    };

    /// Reads a command line such as `cpus=2 pattern=working-set set=64M rate=20000`.
    ///
    /// Left out: 1 vCPU, sequential, all memory, a set of 64 MiB, 16 visits of a page until a moving set
    /// is past it, as fast as it can, 50 % random, the rest one word, no fill (`fill_random` as `random`), seed 1, nothing
    /// shared. Words that VMMs add for Linux pass: those without
    /// `=`, with a dot in their name, and `console`, `root`, `reboot`, `panic`, `pci`, `earlyprintk`.
    ///
    /// # Errors
    /// The first word that is not understood, or whose value is out of bounds.
    pub fn parse(command_line: &str) -> Result<Self, BadParam<'_>> {
        let mut p = Self::DEFAULT;
        let mut fill_random = None;
        for word in command_line.split_ascii_whitespace() {
            let bad = |why| BadParam { word, why };
            let Some((key, value)) = word.split_once('=') else { continue };
            let number = || value.parse::<u64>().map_err(|_| bad(NUMBER));
            match key {
                "cpus" => {
                    p.cpus = value
                        .parse()
                        .ok()
                        .filter(|n| (1..=Self::MAX_CPUS).contains(n))
                        .ok_or(bad("must be 1 to 32"))?;
                }
                "pattern" => {
                    p.pattern = Pattern::NAMES
                        .iter()
                        .find(|(name, _)| *name == value)
                        .map(|(_, pattern)| *pattern)
                        .ok_or(bad(
                            "must be sequential, random, working-set, moving-set, idle, read or random-read",
                        ))?;
                }
                "arena" => p.arena_bytes = size(value).ok_or(bad(SIZE))?,
                "set" => p.set_bytes = size(value).filter(|n| *n > 0).ok_or(bad(SIZE))?,
                "dwell" => {
                    p.dwell = number()?;
                    if p.dwell == 0 {
                        return Err(bad("must be 1 or more"));
                    }
                }
                "rate" => p.rate = number()?,
                "random" => p.random_percent = percent(value).ok_or(bad("must be 0 to 100"))?,
                "rest" => {
                    p.text = match value {
                        "word" => false,
                        "text" => true,
                        _ => return Err(bad("must be word or text")),
                    }
                }
                "fill" => {
                    (p.fill, p.fill_zeros) = match value {
                        "none" => (false, false),
                        "all" => (true, false),
                        "zeros" => (true, true),
                        _ => return Err(bad("must be none, all or zeros")),
                    }
                }
                "fill_random" => fill_random = Some(percent(value).ok_or(bad("must be 0 to 100"))?),
                "tsc_khz" => p.tsc_khz = number()?,
                "seed" => p.seed = number()?,
                "shared" => p.shared_percent = percent(value).ok_or(bad("must be 0 to 100"))?,
                "console" | "root" | "reboot" | "panic" | "pci" | "earlyprintk" => {}
                _ if key.contains('.') => {}
                _ => return Err(bad(KNOWN)),
            }
        }
        p.fill_random_percent = fill_random.unwrap_or(p.random_percent);
        Ok(p)
    }

    /// The seed of page `index`.
    #[inline]
    pub fn seed_of(&self, index: u32) -> u64 {
        const PERIOD: u32 = 4096;
        if index % PERIOD * 100 < self.shared_percent * PERIOD { 0 } else { self.seed }
    }

    /// The random share of a page at `version`: the fill writes version 1.
    pub fn percent_at(&self, version: u32) -> u32 {
        if self.fill && version == 1 { self.fill_random_percent } else { self.random_percent }
    }
}

/// As [`Params::parse`] reads it.
impl fmt::Display for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cpus={} pattern={} arena={} set={} dwell={} rate={} random={} rest={} fill={} fill_random={} tsc_khz={} \
             seed={} shared={}",
            self.cpus,
            self.pattern.name(),
            self.arena_bytes,
            self.set_bytes,
            self.dwell,
            self.rate,
            self.random_percent,
            if self.text { "text" } else { "word" },
            match (self.fill, self.fill_zeros) {
                (false, _) => "none",
                (true, false) => "all",
                (true, true) => "zeros",
            },
            self.fill_random_percent,
            self.tsc_khz,
            self.seed,
            self.shared_percent
        )
    }
}

fn size(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' | b'k' => (&value[..value.len() - 1], 10),
        b'M' | b'm' => (&value[..value.len() - 1], 20),
        b'G' | b'g' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes <= Params::MAX_ARENA_BYTES && bytes.is_multiple_of(PAGE_BYTES)).then_some(bytes)
}

fn percent(value: &str) -> Option<u32> {
    value.parse().ok().filter(|n| *n <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back() {
        let p = Params::parse(
            "console=ttyS0 quiet cpus=4 pattern=working-set arena=1G set=512K rate=20000 random=75 fill=all \
             virtio_mmio.device=4K@0xd0000000:5 fill_random=100 tsc_khz=2400000 seed=9 dwell=3 shared=60",
        )
        .unwrap();
        assert_eq!((p.cpus, p.pattern, p.arena_bytes), (4, Pattern::WorkingSet, 1 << 30));
        assert_eq!((p.set_bytes, p.rate, p.random_percent), (512 << 10, 20_000, 75));
        assert_eq!((p.percent_at(1), p.percent_at(2)), (100, 75));
        assert_eq!((p.dwell, p.shared_percent), (3, 60));
        assert_eq!(Params::parse(&p.to_string()), Ok(p));
        for (name, pattern) in Pattern::NAMES {
            assert_eq!(Params::parse(&format!("pattern={name}")).unwrap().pattern, pattern);
        }
        assert_eq!(Params::parse(""), Ok(Params::DEFAULT));
        assert_eq!(Params::parse("random=7 fill=all").unwrap().fill_random_percent, 7);
        for words in ["fill=none", "fill=all rest=word", "fill=zeros rest=text"] {
            let p = Params::parse(words).unwrap();
            assert_eq!(Params::parse(&p.to_string()), Ok(p));
        }
    }

    #[test]
    fn a_bad_word_is_named() {
        for word in [
            "cpus=0",
            "cpus=33",
            "cpus=x",
            "pattern=zigzag",
            "arena=1T",
            "arena=5",
            "arena=",
            "set=0",
            "arena=99999999999G",
            "rate=-1",
            "random=101",
            "fill=some",
            "rest=some",
            "fill_random=x",
            "ratee=1",
            "dwell=0",
            "shared=101",
            "=",
            "arena=é",
        ] {
            let line = format!("seed=3 {word} cpus=1");
            let e = Params::parse(&line).expect_err(word);
            assert_eq!(e.word, word);
            assert!(e.to_string().contains(word), "{e}");
        }
    }

    #[test]
    fn guests_with_one_seed_are_alike_and_others_as_far_as_they_share() {
        let stamps = |words: &str| {
            let p = Params::parse(words).unwrap();
            (0..8192).map(|i| super::super::Stamp::of(&p, i, 1)).collect::<Vec<_>>()
        };
        for shared in [0, 25, 60, 100] {
            let words = |seed| format!("fill=all seed={seed} shared={shared}");
            let (a, b) = (stamps(&words(1)), stamps(&words(2)));
            let alike = a.iter().zip(&b).filter(|(a, b)| a == b).count();
            assert_eq!(alike, (8192_usize * shared).div_ceil(100).next_multiple_of(2), "{shared}");
            assert_eq!(a, stamps(&words(1)));
            assert!(a.windows(2).all(|w| w[0] != w[1]), "no two pages of a guest are alike");
        }
    }
}
