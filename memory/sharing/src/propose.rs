//! Which ranges are worth the kernel's while.

use std::collections::BTreeMap;

use ferry_pages::PageSet;

use crate::census::{Counted, Range};
use crate::{Census, MachineNo, RANGE_PAGES, Tenant};

/// When a range of 2 MiB is worth advising.
///
/// The kernel keeps 64 bytes for each page that it is to look at (`rmap_item`), so that a range pays from 8
/// equal pages of 512 on; looking at it again and again costs much more than these. Each range that is advised
/// while its neighbour is not splits a mapping, of which a process may have 65,530 (`vm.max_map_count`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worth {
    /// Equal pages from which on a range is advised.
    pub advise_from_pages: u64,
    /// Equal pages below which it is not worth its advice any more …
    pub withdraw_below_pages: u64,
    /// … if that is so in as many proposals, one behind the other. A page that the kernel merged reads as
    /// written once, so this is more than the passes after which it is held again.
    pub patience: u8,
    /// Most ranges of one machine.
    pub most_ranges: usize,
    /// A tenant's equal pages must exceed those of the one whose ranges are advised by this many percent
    /// before it takes its place: all that was merged is copied again then.
    pub change_tenant_percent: u64,
}

impl Default for Worth {
    fn default() -> Self {
        Self {
            advise_from_pages: 64,
            withdraw_below_pages: 16,
            patience: 8,
            most_ranges: 4096,
            change_tenant_percent: 100,
        }
    }
}

/// What is to be advised, all in all: what is advised already and is not in it, no longer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proposal {
    /// Whose pages. The kernel merges whatever is advised on the host, so that it is of one tenant only.
    pub tenant: Option<Tenant>,
    /// The pages of each machine that has any.
    pub pages: BTreeMap<MachineNo, PageSet>,
    /// How many ranges these are.
    pub ranges: usize,
    /// Pages in them that have an equal, estimated where the equal is elsewhere.
    pub equal_pages: u64,
}

/// A range that is worth it: its number and equal pages.
type Candidate = (u64, usize);

impl Census {
    /// Says which ranges to advise now, by `worth`; costs a look at each range. If tenants are kept apart, only
    /// those of one of them.
    pub fn propose(&mut self, worth: &Worth) -> Proposal {
        self.propose_for(worth, None)
    }

    /// The same, for the tenant that somebody chose who knows all processes of the host
    /// ([`best_tenant`](crate::best_tenant)).
    pub fn propose_for(&mut self, worth: &Worth, chosen: Option<&Tenant>) -> Proposal {
        let mut by_machine: BTreeMap<MachineNo, Vec<Candidate>> = BTreeMap::new();
        let mut gains: BTreeMap<Tenant, u64> = BTreeMap::new();
        for (no, counted) in (0..).zip(&self.machines) {
            let Some(counted) = counted else { continue };
            let mut found = Vec::new();
            for (no, _) in counted.stretches.iter().flat_map(|s| s.numbered()) {
                let range = &mut self.ranges[no];
                let equal = equal_pages(range, counted);
                let floor = match range.advised {
                    true => worth.withdraw_below_pages,
                    false => worth.advise_from_pages,
                };
                range.poor = if equal >= floor { 0 } else { range.poor.saturating_add(1) };
                if equal >= floor || range.advised && range.poor < worth.patience {
                    found.push((equal, no));
                }
            }
            // Ranges that are advised stay before others come: each change costs.
            found.sort_by_key(|(equal, no)| (!self.ranges[*no].advised, u64::MAX - equal, *no));
            found.truncate(worth.most_ranges);
            *gains.entry(counted.tenant.clone()).or_default() +=
                found.iter().map(|(equal, _)| equal).sum::<u64>();
            by_machine.insert(MachineNo(no), found);
        }
        let tenant = match chosen {
            Some(tenant) => Some(tenant.clone()),
            // Where nobody gains anything for now, those that are advised stay for their patience.
            None => choose(&gains, self.advised.as_ref(), worth.change_tenant_percent)
                .or_else(|| self.advised.clone()),
        };
        let apart = self.keeps_tenants_apart();
        let mut proposal = Proposal::default();
        for (machine, mut found) in by_machine {
            let Some(counted) = self.machine(machine) else { continue };
            if apart && Some(&counted.tenant) != tenant.as_ref() {
                found.clear();
            }
            let mut pages = PageSet::new();
            let numbered: Vec<_> = counted.stretches.iter().flat_map(|s| s.numbered()).collect();
            found.sort_by_key(|(_, no)| *no);
            for (no, run) in numbered {
                let place = found.binary_search_by_key(&no, |(_, no)| *no);
                self.ranges[no].advised = place.is_ok();
                if let Ok(place) = place {
                    pages.insert_run(run);
                    proposal.ranges += 1;
                    proposal.equal_pages += found[place].0;
                }
            }
            if !pages.is_empty() {
                proposal.pages.insert(machine, pages);
            }
        }
        self.advised = tenant.filter(|_| proposal.ranges > 0);
        proposal.tenant.clone_from(&self.advised);
        proposal
    }

    /// The pages of `machine` that were last proposed.
    pub(crate) fn advised_pages(&self, machine: MachineNo) -> PageSet {
        let stretches = self.machine(machine).map_or(&[][..], |m| &m.stretches);
        let numbered = stretches.iter().flat_map(|s| s.numbered());
        numbered.filter(|(no, _)| self.ranges[*no].advised).map(|(_, run)| run).collect()
    }
}

/// The equal pages of a range, with an estimate for those elsewhere, of which only a sample is known.
fn equal_pages(range: &Range, counted: &Counted) -> u64 {
    let elsewhere = u64::from(range.elsewhere) << counted.elsewhere.sample_bits();
    let room = u64::from(range.held - range.zero - range.twins);
    (u64::from(range.zero) + u64::from(range.twins) + elsewhere.min(room)).min(RANGE_PAGES)
}

/// The tenant that gains most; the one that is there already, unless another gains so much more.
pub(crate) fn choose(
    gains: &BTreeMap<Tenant, u64>,
    now: Option<&Tenant>,
    more_percent: u64,
) -> Option<Tenant> {
    // Of several the first by name, so that every process would choose the same.
    let (best, gain) =
        gains.iter().rev().max_by_key(|(_, gain)| **gain).filter(|(_, g)| **g > 0)?;
    let kept = now.filter(|now| {
        let bar = gains.get(now).map_or(0, |g| g.saturating_mul(100 + more_percent) / 100);
        bar > 0 && *gain <= bar
    });
    Some(kept.unwrap_or(best).clone())
}
