//! What is known of a host and its machines: what they were promised, and what is seen of them.

use serde::Serialize;

use crate::Size;

/// Memory is handed out in pages of this many bytes.
pub const PAGE_BYTES: u64 = 4096;
/// No machine and no host is larger, in bytes: sums and shares of sizes cannot overflow.
pub const LARGEST_BYTES: u64 = 1 << 50;

/// A host, as its operator configured it.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Physical memory that machines, and what runs them, may take together, in bytes.
    pub budget_bytes: u64,
    /// What of it is kept free, in bytes: time to take memory back before it is all gone. A third of it is
    /// never handed out at all.
    pub headroom_bytes: u64,
    /// What each machine takes beside its memory (page tables, its process), in bytes.
    pub overhead_bytes: u64,
    /// Room for pages in the swap file, in bytes; 0: no swap file.
    pub swap_bytes: u64,
    /// What idle memory is charged more than active memory.
    pub tax: Tax,
}

impl Host {
    /// A host with this budget, the usual headroom (6 % of it, as in ESX), no swap file, and the usual tax.
    #[must_use]
    pub fn new(budget_bytes: u64) -> Self {
        Self {
            budget_bytes,
            headroom_bytes: budget_bytes / 100 * 6,
            overhead_bytes: 48 << 20,
            swap_bytes: 0,
            tax: Tax::default(),
        }
    }

    /// What `machines` may be given in all, in bytes.
    #[must_use]
    pub fn usable_bytes(&self, machines: u64) -> u64 {
        let taken =
            self.overhead_bytes.saturating_mul(machines).saturating_add(self.headroom_bytes);
        self.budget_bytes.saturating_sub(taken)
    }
}

/// τ: the share of a machine's idle memory that counts as if others paid for it. Such memory costs
/// 1 ÷ (1 − τ) times as much as active memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tax {
    permille: u16,
}

impl Tax {
    /// So many thousandths, less than 1000; none if it is more.
    #[must_use]
    pub fn permille(permille: u16) -> Option<Self> {
        (permille < 1000).then_some(Self { permille })
    }

    /// What `active` costs if it is idle.
    pub(crate) fn idle_cost(self, active: u128) -> u128 {
        active * 1000 / u128::from(1000 - self.permille)
    }
}

impl Default for Tax {
    /// 0.75, as in Waldspurger's paper.
    fn default() -> Self {
        Self { permille: 750 }
    }
}

/// A machine, and what it was promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name: one of a kind on the host.
    pub name: String,
    /// Memory that its guest sees, in bytes.
    pub size_bytes: u64,
    /// It always may hold this much physical memory, in bytes.
    pub reservation_bytes: u64,
    /// It never holds more physical memory than this, in bytes.
    pub limit_bytes: u64,
    /// Its weight against other machines, at least 1.
    pub shares: u32,
    /// Whose it is.
    pub tenant: Option<String>,
    /// Whether its guest can be asked for memory.
    pub can_balloon: bool,
    /// Whether its pages can be swapped. One that cannot be swapped may take its whole size at any time, and
    /// so has it reserved.
    pub can_swap: bool,
    /// Whether its equal pages may be merged.
    pub can_share: bool,
}

impl Machine {
    /// A machine that was promised nothing, of 1000 shares, from which memory can be taken in every way.
    #[must_use]
    pub fn new(name: impl Into<String>, size_bytes: u64) -> Self {
        Self {
            name: name.into(),
            size_bytes,
            reservation_bytes: 0,
            limit_bytes: size_bytes,
            shares: 1000,
            tenant: None,
            can_balloon: true,
            can_swap: true,
            can_share: true,
        }
    }

    /// What it can always hold, in bytes: its reservation; all of it if it cannot be swapped.
    #[must_use]
    pub fn floor_bytes(&self) -> u64 {
        if self.can_swap { self.reservation_bytes } else { self.size_bytes }
    }

    /// Whether the figures make sense by themselves.
    ///
    /// # Errors
    /// The figure that does not.
    pub fn check(&self) -> Result<(), BadMachine> {
        let bad = |what: String| Err(BadMachine { name: self.name.clone(), what });
        let Self { size_bytes, reservation_bytes, limit_bytes, .. } = *self;
        if self.name.is_empty() {
            return bad("`name` is empty: give it one".into());
        }
        if size_bytes == 0 || size_bytes > LARGEST_BYTES {
            let most = Size(LARGEST_BYTES);
            return bad(format!(
                "`size` is {}: it must be more than 0 and at most {most}",
                Size(size_bytes)
            ));
        }
        for (key, bytes) in
            [("size", size_bytes), ("reservation", reservation_bytes), ("limit", limit_bytes)]
        {
            if !bytes.is_multiple_of(PAGE_BYTES) {
                return bad(format!(
                    "`{key}` is {bytes} bytes: make it a multiple of {PAGE_BYTES}"
                ));
            }
        }
        if limit_bytes > size_bytes {
            let (limit, size) = (Size(limit_bytes), Size(size_bytes));
            return bad(format!(
                "`limit` ({limit}) is more than `size` ({size}): lower it, or leave it out"
            ));
        }
        if reservation_bytes > limit_bytes {
            let (reserved, limit) = (Size(reservation_bytes), Size(limit_bytes));
            return bad(format!(
                "`reservation` ({reserved}) is more than `limit` ({limit}): lower the reservation"
            ));
        }
        if limit_bytes == 0 {
            return bad("`limit` is 0: it could not run a single instruction".into());
        }
        if !self.can_swap && limit_bytes < size_bytes {
            return bad(
                "`limit` is less than `size`, but without swap nothing can hold the machine to it: allow swap, or leave the limit out"
                    .into(),
            );
        }
        if self.shares == 0 {
            return bad("`shares` is 0: give it at least 1".into());
        }
        Ok(())
    }
}

/// A machine whose figures make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("machine `{name}`: {what}")]
pub struct BadMachine {
    /// Which.
    pub name: String,
    /// The key and what to do.
    pub what: String,
}

/// What is seen of a machine at one moment, all in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// Pages that are mapped here, merged ones included.
    pub resident_bytes: u64,
    /// What the guest has put into its balloon.
    pub ballooned_bytes: u64,
    /// Pages that are in the compressed pool or the swap file, as the guest sees them.
    pub swapped_bytes: u64,
    /// What the compressed pool takes for them.
    pub pool_bytes: u64,
    /// Part of `resident_bytes` that costs nothing, since another page holds the same.
    pub saved_bytes: u64,
    /// Part of `resident_bytes` that was touched since the last look; none: nobody looked.
    pub active_bytes: Option<u64>,
    /// Pages that were touched while they were swapped, in bytes a second.
    pub swap_in_bytes_per_s: u64,
    /// Whether the guest's balloon driver is there and answers.
    pub balloon_answers: bool,
}

impl Observed {
    /// Physical memory that it holds, in bytes.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.saved_bytes).saturating_add(self.pool_bytes)
    }

    /// What it would hold if nothing of it were swapped, in bytes.
    pub(crate) fn touched_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.saved_bytes).saturating_add(self.swapped_bytes)
    }
}

/// How long tasks of the host waited for memory, as the kernel tells it (PSI, `Documentation/accounting/psi.rst`),
/// in percent of the last 10 seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Pressure {
    /// Time in which at least one waited.
    pub some: f64,
    /// Time in which all waited.
    pub full: f64,
}

impl Pressure {
    /// Reads `/proc/pressure/memory`, or `memory.pressure` of a cgroup; none if it is not that.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let average = |kind: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
            let word = line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
            word.parse::<f64>().ok().filter(|percent| percent.is_finite())
        };
        Some(Self { some: average("some")?, full: average("full")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn figures_that_make_no_sense_are_refused_by_key() {
        type Change = fn(&mut Machine);
        let cases: [(&str, Change); 9] = [
            ("`name` is empty", |m| m.name.clear()),
            ("`size` is 0 bytes", |m| m.size_bytes = 0),
            ("`size` is 1025 TiB", |m| m.size_bytes = 1025 << 40),
            ("`reservation` is 5 bytes", |m| m.reservation_bytes = 5),
            ("`limit` (4 GiB) is more than `size` (3 GiB)", |m| m.limit_bytes = 4 * GIB),
            ("`reservation` (2 GiB) is more than `limit` (1 GiB)", |m| {
                m.limit_bytes = GIB;
                m.reservation_bytes = 2 * GIB;
            }),
            ("`limit` is 0", |m| m.limit_bytes = 0),
            ("without swap", |m| {
                m.limit_bytes = GIB;
                m.can_swap = false;
            }),
            ("`shares` is 0", |m| m.shares = 0),
        ];
        let good = Machine::new("a", 3 * GIB);
        assert_eq!(good.check(), Ok(()));
        for (words, change) in cases {
            let mut machine = good.clone();
            change(&mut machine);
            let said = machine.check().expect_err(words).to_string();
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn figures_that_just_fit_are_taken() {
        type Change = fn(&mut Machine);
        let cases: [Change; 4] = [
            |m| (m.size_bytes, m.limit_bytes) = (LARGEST_BYTES, LARGEST_BYTES),
            |m| m.reservation_bytes = m.limit_bytes,
            |m| (m.limit_bytes, m.shares) = (PAGE_BYTES, 1),
            |m| m.can_swap = false,
        ];
        for (i, change) in (0..).zip(cases) {
            let mut machine = Machine::new("a", 3 * GIB);
            change(&mut machine);
            assert_eq!(machine.check(), Ok(()), "case {i}");
        }
    }

    #[test]
    fn a_tax_of_all_is_none() {
        assert_eq!([999, 1000, 1001].map(|t| Tax::permille(t).is_some()), [true, false, false]);
    }

    #[test]
    fn pressure_is_read_from_the_kernels_words() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=3\n";
        assert_eq!(Pressure::parse(text), Some(Pressure { some: 1.5, full: 0.25 }));
        for bad in
            ["", "some avg10=1.0", "some avg10=x\nfull avg10=1", "full avg10=nan\nsome avg10=1"]
        {
            assert_eq!(Pressure::parse(bad), None, "{bad}");
        }
    }
}
