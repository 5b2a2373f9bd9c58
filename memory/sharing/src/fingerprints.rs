//! What one process tells others of its pages, so that equal ones are found across processes.
//!
//! Hashes only: no page leaves its process, and the kernel compares before it merges. A sample by the hash's
//! own value (1 of 16: its upper four bits are zero) is the same sample in every process, so that an equal of a
//! page in it is in it, too. It is small (3 GiB of pages: 50,000 hashes, 0.5 MB), and fair: what is found in it
//! counts 16 times.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::propose::choose;
use crate::{Between, Census, MachineNo};

/// Whose machine it is, by any name that the host's operator uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tenant(pub String);

/// No sample is thinner than 1 of 65,536.
const MOST_SAMPLE_BITS: u8 = 16;
/// One page of 16: of 2 MiB that is 32.
pub const SAMPLE_BITS: u8 = 4;

fn sampled(hash: u64, bits: u8) -> bool {
    bits == 0 || hash >> (64 - u32::from(bits.min(MOST_SAMPLE_BITS))) == 0
}

/// Hashes of the lasting pages of one machine, zero pages aside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Whose.
    pub tenant: Tenant,
    /// Hashes whose upper bits, as many, are zero: all of them if 0.
    pub sample_bits: u8,
    /// Each hash with how many pages have it, ascending.
    pub hashes: Vec<(u64, u32)>,
}

impl Fingerprints {
    /// Those of `machine`: a sample by [`SAMPLE_BITS`] for an estimate, or all (0) where it pays. Costs a look at
    /// every page of the machine.
    pub fn of(census: &Census, machine: MachineNo, sample_bits: u8) -> Self {
        let sample_bits = sample_bits.min(MOST_SAMPLE_BITS);
        let mut all: Vec<u64> =
            census.hashes(machine).filter(|hash| sampled(*hash, sample_bits)).collect();
        all.sort_unstable();
        let mut hashes: Vec<(u64, u32)> = Vec::new();
        for hash in all {
            match hashes.last_mut() {
                Some((last, pages)) if *last == hash => *pages += 1,
                _ => hashes.push((hash, 1)),
            }
        }
        hashes.shrink_to_fit();
        let tenant = census.machine(machine).map(|m| m.tenant.clone()).unwrap_or_default();
        Self { tenant, sample_bits, hashes }
    }
}

/// Hashes of pages that have an equal in another process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u8, Vec<u64>)", into = "(u8, Vec<u64>)")]
pub struct Twins {
    sample_bits: u8,
    /// Ascending.
    hashes: Vec<u64>,
}

impl Twins {
    /// Which pages of `all[mine]` have an equal in any of the others, of the same tenant if `between` says so.
    pub fn of(all: &[Fingerprints], mine: usize, between: Between) -> Self {
        let Some(own) = all.get(mine) else { return Self::default() };
        let others = || {
            let others = all.iter().enumerate().filter(|(no, _)| *no != mine).map(|(_, f)| f);
            others.filter(|f| between == Between::AllTenants || f.tenant == own.tenant)
        };
        let bits = others().map(|f| f.sample_bits).fold(own.sample_bits, u8::max);
        let mut theirs: Vec<u64> =
            others().flat_map(|f| f.hashes.iter().map(|(hash, _)| *hash)).collect();
        theirs.sort_unstable();
        let found = own.hashes.iter().map(|(hash, _)| *hash);
        let found = found.filter(|hash| sampled(*hash, bits) && theirs.binary_search(hash).is_ok());
        Self::from((bits, found.collect()))
    }

    /// How many hashes.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    pub(crate) fn sample_bits(&self) -> u8 {
        self.sample_bits
    }

    pub(crate) fn contains(&self, hash: u64) -> bool {
        !self.hashes.is_empty()
            && sampled(hash, self.sample_bits)
            && self.hashes.binary_search(&hash).is_ok()
    }
}

/// What comes from another process need not be in order.
impl From<(u8, Vec<u64>)> for Twins {
    fn from((sample_bits, mut hashes): (u8, Vec<u64>)) -> Self {
        hashes.sort_unstable();
        hashes.dedup();
        Self { sample_bits: sample_bits.min(MOST_SAMPLE_BITS), hashes }
    }
}

impl From<Twins> for (u8, Vec<u64>) {
    fn from(twins: Twins) -> Self {
        (twins.sample_bits, twins.hashes)
    }
}

/// How many pages merging would give back, for each tenant (all are one if `between` says so, by the empty
/// name), estimated from samples; zero pages aside.
pub fn estimate(all: &[Fingerprints], between: Between) -> BTreeMap<Tenant, u64> {
    let mut by_tenant: BTreeMap<Tenant, Vec<&Fingerprints>> = BTreeMap::new();
    for prints in all {
        let tenant = match between {
            Between::OneTenant => prints.tenant.clone(),
            Between::AllTenants => Tenant::default(),
        };
        by_tenant.entry(tenant).or_default().push(prints);
    }
    let gain = |prints: Vec<&Fingerprints>| {
        let bits = prints.iter().map(|f| f.sample_bits).max().unwrap_or(0).min(MOST_SAMPLE_BITS);
        let hashes = prints.iter().flat_map(|f| &f.hashes).filter(|(hash, _)| sampled(*hash, bits));
        let mut all: Vec<(u64, u32)> = hashes.copied().collect();
        let pages: u64 = all.iter().map(|(_, pages)| u64::from(*pages)).sum();
        all.sort_unstable();
        all.dedup_by_key(|(hash, _)| *hash);
        pages.saturating_sub(all.len() as u64) << bits
    };
    by_tenant.into_iter().map(|(tenant, prints)| (tenant, gain(prints))).collect()
}

/// The tenant whose pages are to be merged on a host: the one that gains most, by [`estimate`]; `now`, whose
/// pages are, unless another gains more by so many percent.
pub fn best_tenant(
    gains: &BTreeMap<Tenant, u64>,
    now: Option<&Tenant>,
    more_percent: u64,
) -> Option<Tenant> {
    choose(gains, now, more_percent)
}
