//! One machine of one process: looked at, advised, merged, and told of.

use std::fmt;
use std::time::Duration;

use ferry_memory::GuestView;
use ferry_pages::PageSet;

use crate::{
    Between, Counts, Fingerprints, Ksm, MachineNo, MergeError, Merged, Merger, Pass,
    ProcessFigures, Rest, ScanError, Scanner, Tenant, Twins, Worth,
};

/// How pages of a machine are shared.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whose machine it is.
    pub tenant: Tenant,
    /// Whether its pages may be one with those of other tenants.
    pub between: Between,
    /// What is worth advising.
    pub worth: Worth,
    /// The kernel's merging.
    pub ksm: Ksm,
}

/// Passes for which a page was not written before it is read and counted.
const QUIET_PASSES: usize = 2;

/// What was found and done, and by which way.
#[derive(Debug, Default)]
pub struct Report {
    /// The last pass.
    pub pass: Pass,
    /// Pages that last, and what they are.
    pub counts: Counts,
    /// Ranges of 2 MiB that are advised.
    pub ranges: usize,
    /// Pages in these that have an equal, as far as is known.
    pub proposed_pages: u64,
    /// What the kernel has merged of this process, as it was last read back.
    pub read_back: ProcessFigures,
    /// How the last merging ended that was asked for here.
    pub rest: Rest,
    /// Why the last pass could not advise what is worth it.
    pub not_advised: Option<MergeError>,
    /// Why the kernel could not be had to merge what is advised, when that was last tried.
    pub not_merged: Option<MergeError>,
}

impl Report {
    /// Why the kernel does not merge, if it does not: then pages of zeros and pages that are never written are
    /// proposed to be swapped out instead.
    pub fn why_not(&self) -> Option<&MergeError> {
        self.not_advised.as_ref().or(self.not_merged.as_ref())
    }
}

/// Shares the pages of one machine, the only one of its process.
#[derive(Debug)]
pub struct Sharing {
    scanner: Scanner,
    machine: MachineNo,
    merger: Merger,
    worth: Worth,
    /// Whose it is, where tenants are kept apart.
    tenant: Option<Tenant>,
    /// The tenant that comes first on this host.
    first: Option<Tenant>,
    report: Report,
}

impl Sharing {
    /// Shares pages of the machine that `view` sees.
    ///
    /// # Errors
    /// Its pages cannot be scanned.
    pub fn new(view: GuestView, options: Options) -> Result<Self, ScanError> {
        let Options { tenant, between, worth, ksm } = options;
        let mut scanner = Scanner::new(between, QUIET_PASSES)?;
        let machine = scanner.add(view.clone(), tenant.clone())?;
        let merger = Merger::new(view, ksm, tenant.clone(), between);
        let tenant = Some(tenant).filter(|_| between == Between::OneTenant);
        let report = Report::default();
        Ok(Self { scanner, machine, merger, worth, tenant, first: None, report })
    }

    /// Looks at what became quiet, and advises what is worth it now. `written`: as in [`Scanner::pass`].
    ///
    /// # Errors
    /// Pages cannot be scanned. That the kernel does not merge is no error: see [`Report::why_not`].
    pub fn pass(&mut self, written: &PageSet) -> Result<&Report, ScanError> {
        self.report.pass = self.scanner.pass(self.machine, written)?;
        let census = self.scanner.census_mut();
        self.report.counts = census.counts();
        let mut proposal = census.propose(&self.worth);
        let mut pages = proposal.pages.remove(&self.machine).unwrap_or_default();
        let comes_later = match (&self.tenant, &self.first) {
            (Some(ours), Some(first)) if ours != first && !pages.is_empty() => {
                pages = PageSet::new();
                Some(MergeError::OtherTenant { theirs: first.clone(), ours: ours.clone() })
            }
            _ => None,
        };
        self.report.proposed_pages = proposal.equal_pages;
        self.report.not_advised = self.merger.advise(&pages).err().or(comes_later);
        self.report.ranges = if self.merger.advised().is_empty() { 0 } else { proposal.ranges };
        Ok(&self.report)
    }

    /// Has the kernel merge what is advised, and reads back what came of it: as [`Merger::merge`].
    pub fn merge(&mut self, patience: Duration, stop: &dyn Fn() -> bool) -> &Report {
        match self.merger.merge(patience, stop) {
            Ok(Merged { own, rest, .. }) => {
                (self.report.read_back, self.report.rest) = (own, rest);
                self.report.not_merged = None;
            }
            Err(e) => self.report.not_merged = Some(e),
        }
        &self.report
    }

    /// What was found and done.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Pages to swap out where the kernel does not merge them: those of zeros, and those that are never written.
    /// They are proposals, since the guest may write any page at any time: who swaps moves a page out in one
    /// step, looks at it, and keeps nothing of one that is zero.
    pub fn to_swap(&self) -> (PageSet, PageSet) {
        let mut zeros = self.scanner.census().zeros(self.machine);
        let mut unwritten = self.scanner.unwritten(self.machine);
        unwritten.subtract(&zeros);
        if self.report.why_not().is_none_or(MergeError::is_for_now) {
            zeros.subtract(self.merger.advised());
            unwritten.subtract(self.merger.advised());
        }
        (zeros, unwritten)
    }

    /// What to tell other processes: see [`Fingerprints::of`].
    pub fn fingerprints(&self, sample_bits: u8) -> Fingerprints {
        Fingerprints::of(self.scanner.census(), self.machine, sample_bits)
    }

    /// Which pages have equals in other processes; the next pass advises by it.
    pub fn set_elsewhere(&mut self, elsewhere: Twins) {
        self.scanner.census_mut().set_elsewhere(self.machine, elsewhere);
    }

    /// Says whose pages are merged on this host, by whoever knows all its machines
    /// ([`best_tenant`](crate::best_tenant)): the next pass advises no others'. None: whoever comes first.
    pub fn set_first(&mut self, tenant: Option<Tenant>) {
        self.first = tenant;
    }

    /// Advises nothing any more: before the machine moves, or where another tenant comes first.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn withdraw(&mut self) -> Result<(), MergeError> {
        self.merger.withdraw()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pass, counts, ranges, proposed_pages, read_back, .. } = self;
        writeln!(
            f,
            "scanned {} pages at {:.1} GB/s, left {} alone that change; {} last, {} of them zero, {} given back if \
             all equal ones here were merged",
            pass.scanned_pages,
            pass.bytes_per_second() / 1e9,
            pass.unstable_pages,
            counts.held,
            counts.zero,
            counts.equal,
        )?;
        writeln!(f, "advised {ranges} ranges of 2 MiB with {proposed_pages} equal pages")?;
        match self.why_not() {
            Some(why) if why.is_for_now() => write!(f, "not merged by the kernel yet: {why}"),
            Some(why) => write!(f, "not merged by the kernel, but proposed for swap: {why}"),
            None => write!(
                f,
                "merged by the kernel: {} pages, {} zero pages, profit {} MiB",
                read_back.merging_pages,
                read_back.zero_pages,
                read_back.profit_bytes >> 20,
            ),
        }
    }
}
