//! Who gets how much: shares, an idle-memory tax, reservations and limits.
//!
//! Waldspurger (*Memory Resource Management in VMware ESX Server*, OSDI '02, sections 5.1 and 5.2) takes memory
//! from the machine that pays least for each page,
//!
//! ```text
//!   ρ  =  S ÷ (P × (f + k × (1 − f))),      k = 1 ÷ (1 − τ)
//! ```
//!
//! with S shares, P pages of which the share f is active, and a tax τ on idle ones. With A = f × P active
//! pages the divisor is what the memory *costs*: A + k × (P − A). Taking from the least ρ until nothing moves
//! ends where all have the same ρ, but those that are at their floor or ceiling. That end is computed here
//! at once, and so does not swing: the highest level of cost for each share at which all fits.
//!
//! Where all could have what they ask for, the same is done once more with what is left, up to their limits.

use crate::machine::{PAGE_BYTES, Tax};

/// What one machine may get, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// It gets at least this, whatever others get.
    pub floor_bytes: u64,
    /// What it can use now.
    pub wanted_bytes: u64,
    /// It gets no more than this.
    pub limit_bytes: u64,
    /// Its weight.
    pub shares: u32,
    /// Memory that it uses all the time: the rest is taxed.
    pub active_bytes: u64,
}

/// Divides `usable_bytes`: one figure for each claim, in bytes, whole pages. Their sum is no more than
/// `usable_bytes`, unless that of the floors is: then each gets its floor.
#[must_use]
pub fn divide(usable_bytes: u64, tax: Tax, claims: &[Claim]) -> Vec<u64> {
    let usable = usable_bytes / PAGE_BYTES;
    let mut stretches: Vec<Stretch> =
        claims.iter().map(|claim| Stretch::wanted(claim, tax)).collect();
    let wanted = fill(usable, &stretches);
    for ((stretch, claim), pages) in stretches.iter_mut().zip(claims).zip(&wanted) {
        stretch.from = *pages;
        stretch.to = (claim.limit_bytes / PAGE_BYTES).max(*pages);
    }
    // Something is left only if all got what they wanted: otherwise this changes nothing.
    let all = |to: fn(&Stretch) -> u64| stretches.iter().map(to).fold(0, u64::saturating_add);
    let got_all = claims.iter().zip(&wanted).all(|(claim, got)| *got >= want_pages(claim));
    let pages = if got_all && all(|s| s.from) < usable { fill(usable, &stretches) } else { wanted };
    pages.into_iter().map(|pages| pages.saturating_mul(PAGE_BYTES)).collect()
}

fn want_pages(claim: &Claim) -> u64 {
    claim.wanted_bytes.min(claim.limit_bytes) / PAGE_BYTES
}

/// What an active page costs. So fine that from one level to the next no machine gets more than a page,
/// whatever its shares: more shares never get less, not even by rounding.
const ACTIVE_PAGE: u128 = 1 << 32;

/// Between how many pages and how many a machine gets, and what they cost.
struct Stretch {
    from: u64,
    to: u64,
    active: u64,
    shares: u128,
    idle_page: u128,
}

impl Stretch {
    fn wanted(claim: &Claim, tax: Tax) -> Self {
        let from = claim.floor_bytes.div_ceil(PAGE_BYTES);
        Self {
            from,
            to: want_pages(claim).max(from),
            active: claim.active_bytes.div_ceil(PAGE_BYTES),
            shares: u128::from(claim.shares.max(1)),
            idle_page: tax.idle_cost(ACTIVE_PAGE),
        }
    }

    fn cost(&self, pages: u64) -> u128 {
        let active = pages.min(self.active);
        u128::from(active) * ACTIVE_PAGE + u128::from(pages - active) * self.idle_page
    }

    /// What it gets where each share is worth `level`.
    fn pages(&self, level: u128) -> u64 {
        let paid = self.shares.saturating_mul(level);
        let active = u128::from(self.active) * ACTIVE_PAGE;
        let pages = match paid.checked_sub(active) {
            None => paid / ACTIVE_PAGE,
            Some(rest) => u128::from(self.active) + rest / self.idle_page,
        };
        u64::try_from(pages).unwrap_or(u64::MAX).clamp(self.from, self.to)
    }
}

/// The pages that each gets at the highest level at which all fit; those they begin with if they never do.
fn fill(usable: u64, stretches: &[Stretch]) -> Vec<u64> {
    let at = |level| stretches.iter().map(move |s| s.pages(level));
    let fits = |level| at(level).fold(0, u64::saturating_add) <= usable;
    // At the highest level that makes a difference, all have all.
    let top = stretches.iter().map(|s| s.cost(s.to) / s.shares + 1).max().unwrap_or(0);
    let (mut low, mut high) = (0, top);
    while low < high {
        let middle = high - (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    at(low).collect()
}
