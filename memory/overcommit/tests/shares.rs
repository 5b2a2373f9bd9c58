//! Dividing memory keeps its promises, whatever is claimed.
#![allow(clippy::cast_precision_loss, reason = "figures of a few million pages are exact")]

use ferry_overcommit::{Claim, PAGE_BYTES, Tax, divide};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn claim() -> impl Strategy<Value = Claim> {
    let pages = || prop_oneof![0..20_u64, 0..1_000_000_u64];
    let shares = prop_oneof![1..5_u32, 1..100_000_u32, Just(u32::MAX)];
    (pages(), pages(), pages(), pages(), shares).prop_map(|(a, b, wanted, active, shares)| Claim {
        floor_bytes: a.min(b) * PAGE_BYTES,
        wanted_bytes: wanted * PAGE_BYTES,
        limit_bytes: a.max(b) * PAGE_BYTES,
        shares,
        active_bytes: active * PAGE_BYTES,
    })
}

/// Claims whose floors fit, and what there is.
fn fitting() -> impl Strategy<Value = (u64, Vec<Claim>)> {
    (prop::collection::vec(claim(), 1..7), 0..2_000_000_u64).prop_map(|(claims, beside)| {
        let floors: u64 = claims.iter().map(|c| c.floor_bytes).sum();
        (floors + beside * PAGE_BYTES, claims)
    })
}

fn tax() -> impl Strategy<Value = Tax> {
    (0..1000_u16).prop_map(|permille| Tax::permille(permille).expect("below 1000"))
}

/// Waldspurger's formula: shares for what a machine's pages cost.
fn rho(claim: &Claim, gets: u64, k: f64) -> f64 {
    let (pages, active) = ((gets / PAGE_BYTES) as f64, (claim.active_bytes / PAGE_BYTES) as f64);
    let f = (active / pages).min(1.0);
    f64::from(claim.shares) / (pages * (f + k * (1.0 - f)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_more_is_given_than_there_is_and_everyone_stays_between_floor_and_limit(
        (usable, claims) in fitting(), tax in tax()
    ) {
        let gets = divide(usable, tax, &claims);
        prop_assert!(gets.iter().sum::<u64>() <= usable);
        for (claim, gets) in claims.iter().zip(&gets) {
            prop_assert!(claim.floor_bytes <= *gets && *gets <= claim.limit_bytes, "{claim:?} gets {gets}");
        }
    }

    #[test]
    fn nothing_is_left_while_someone_could_have_it((usable, claims) in fitting(), tax in tax()) {
        let gets = divide(usable, tax, &claims);
        let left = usable - gets.iter().sum::<u64>();
        // What one level more would give: less than a page for each.
        let rounding = claims.len() as u64 * PAGE_BYTES;
        let all_have_all = claims.iter().zip(&gets).all(|(claim, gets)| *gets == claim.limit_bytes);
        prop_assert!(left <= rounding || all_have_all, "{left} left of {usable}: {gets:?}");
    }

    #[test]
    fn more_shares_never_get_less((usable, claims) in fitting(), tax in tax(), who in any::<prop::sample::Index>(), more in any::<u32>()) {
        let i = who.index(claims.len());
        let before = divide(usable, tax, &claims)[i];
        let mut raised = claims;
        raised[i].shares = raised[i].shares.saturating_add(more);
        let after = divide(usable, tax, &raised)[i];
        prop_assert!(after >= before, "{before} became {after}");
    }

    #[test]
    fn a_machine_that_uses_more_of_its_memory_never_gets_less(
        (usable, claims) in fitting(), tax in tax(), who in any::<prop::sample::Index>(), more in 0..1_000_000_u64
    ) {
        let i = who.index(claims.len());
        let before = divide(usable, tax, &claims)[i];
        let mut busier = claims;
        busier[i].active_bytes += more * PAGE_BYTES;
        let after = divide(usable, tax, &busier)[i];
        // A page, by rounding.
        prop_assert!(after + PAGE_BYTES >= before, "{before} became {after}");
    }

    #[test]
    fn floors_are_kept_even_if_they_do_not_fit(claims in prop::collection::vec(claim(), 1..7), tax in tax()) {
        let gets = divide(0, tax, &claims);
        prop_assert!(claims.iter().zip(&gets).all(|(claim, gets)| *gets == claim.floor_bytes));
    }

    #[test]
    fn where_nothing_is_bounded_all_pay_the_same_for_a_page(
        actives in prop::collection::vec((0..1_000_000_u64, 1..1000_u32), 2..6), permille in 0..950_u16
    ) {
        let claims: Vec<Claim> = actives.iter().map(|(active, shares)| Claim {
            floor_bytes: 0,
            wanted_bytes: u64::MAX / 2,
            limit_bytes: u64::MAX / 2,
            shares: *shares,
            active_bytes: active * PAGE_BYTES,
        }).collect();
        let gets = divide(100_000_000 * PAGE_BYTES, Tax::permille(permille).expect("a tax"), &claims);
        let k = 1000.0 / f64::from(1000 - permille);
        let all: Vec<f64> = claims.iter().zip(&gets).map(|(claim, gets)| rho(claim, *gets, k)).collect();
        for one in &all {
            prop_assert!((one / all[0] - 1.0).abs() < 0.001, "{all:?}");
        }
    }
}

/// Two machines of 256 MiB and equal shares have 360 MiB between them. One is idle, the other one is not: the setting
/// of Waldspurger's figure 7.
#[test]
fn without_a_tax_shares_alone_count_and_with_it_the_busy_one_gets_what_the_idle_one_does_not_use() {
    let machine = |active_mib: u64| Claim {
        floor_bytes: 0,
        wanted_bytes: 256 * MIB,
        limit_bytes: 256 * MIB,
        shares: 1000,
        active_bytes: active_mib * MIB,
    };
    let claims = [machine(10), machine(256)];
    let usable = 360 * MIB;
    assert_eq!(divide(usable, Tax::permille(0).expect("none"), &claims), [180 * MIB, 180 * MIB]);

    let gets = divide(usable, Tax::default(), &claims);
    assert_eq!(gets.iter().sum::<u64>(), usable);
    assert_eq!(
        gets[1],
        256 * MIB,
        "the busy one has all that it can use, and it pays no more for a page"
    );
    let (idle, busy) = (rho(&claims[0], gets[0], 4.0), rho(&claims[1], gets[1], 4.0));
    assert!(idle < busy, "the idle one has only what the other cannot use: {idle} {busy}");

    // With less between them both can use more, and ρ is equal: 10 + 4 (P − 10) = 240 − P gives P = 54.
    let gets = divide(240 * MIB, Tax::default(), &claims);
    assert_eq!(gets, [54 * MIB, 186 * MIB]);
    let (idle, busy) = (rho(&claims[0], gets[0], 4.0), rho(&claims[1], gets[1], 4.0));
    assert!((idle / busy - 1.0).abs() < 1e-6, "{idle} {busy}");
}

#[test]
fn a_floor_that_is_no_whole_page_is_kept_in_whole_pages() {
    let claim = Claim {
        floor_bytes: PAGE_BYTES + 1,
        wanted_bytes: 0,
        limit_bytes: MIB,
        shares: 1,
        active_bytes: 0,
    };
    assert_eq!(divide(0, Tax::default(), &[claim]), [2 * PAGE_BYTES]);
}

#[test]
fn the_idle_pay_first_and_shares_count_among_the_busy() {
    let machine = |active_mib, shares| Claim {
        floor_bytes: 0,
        wanted_bytes: 1000 * MIB,
        limit_bytes: 1000 * MIB,
        shares,
        active_bytes: active_mib * MIB,
    };
    let gets =
        divide(1400 * MIB, Tax::default(), &[machine(1000, 2), machine(1000, 1), machine(0, 1)]);
    assert!(gets[0] / 2 - gets[1] <= PAGE_BYTES, "{gets:?}");
    assert!(gets[1] / 4 - gets[2] <= PAGE_BYTES, "{gets:?}");
}
