//! A source and a destination step against each other in virtual time, over a network in memory that
//! delays, reorders across channels, cuts and loses, with a guest that writes all the while.
//!
//! After every step: never two running, and what the guest reads is what it had or has written since. At
//! the end: what runs has the memory that the guest had, and nobody waits for what can come.
//! `FERRY_SEEDS=n` runs more seeds; a failing seed is named, and `FERRY_SEED=n cargo test -p ferry-sim
//! --test seeds one_seed -- --nocapture` shows each of its events.

use ferry_sim::{End, Plant, World};

/// What damaged memory is found by.
const MEMORY: &[&str] = &["the guest reads", "memory that is not the guest's", "digests differ"];

fn seeds() -> u64 {
    std::env::var("FERRY_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3000)
}

#[test]
fn every_seed_ends_with_one_machine_whose_memory_is_whole() {
    let mut ends = std::collections::BTreeMap::<String, u64>::new();
    for seed in 0..seeds() {
        let end = World::new(seed, Plant::Nothing).run();
        if let Err(why) = &end {
            panic!("seed {seed}: {why}");
        }
        *ends.entry(format!("{:?}", end.unwrap())).or_default() += 1;
    }
    println!("{ends:?}");
    // The network must be bad enough that every way to end is seen.
    for end in [
        End::Moved,
        End::MovedAfterInquiry,
        End::MovedByPostCopy,
        End::MovedAfterCut,
        End::MovedAfterRejoin,
        End::ReattachedAndMoved,
        End::StayedAndRuns,
        End::ReclaimedAfterInquiry,
        End::ReattachedAndReclaimed,
        End::PausedInDoubt,
        End::Detached,
        End::SourceDied,
    ] {
        assert!(ends.contains_key(&format!("{end:?}")), "no seed ended with {end:?}: {ends:?}");
    }
}

#[test]
fn one_seed() {
    if let Some(seed) = std::env::var("FERRY_SEED").ok().and_then(|s| s.parse().ok()) {
        let mut world = World::new(seed, Plant::Nothing);
        world.traced = true;
        println!("seed {seed}: {:?}", world.run());
    }
}

#[test]
fn a_quiet_network_always_moves_the_machine() {
    for seed in 0..200 {
        let end = World::quiet(seed).run();
        assert!(matches!(end, Ok(End::Moved | End::MovedByPostCopy)), "seed {seed}: {end:?}");
    }
}

#[test]
fn a_lost_dirty_bit_is_found() {
    assert_found(Plant::DropHarvestedBit, &[MEMORY, &["dirty bits lost"]].concat());
}

#[test]
fn a_harvest_left_out_after_save_is_found() {
    assert_found(Plant::SkipHarvestAfterSave, MEMORY);
}

#[test]
fn an_old_page_installed_late_is_found() {
    assert_found(Plant::NoLedger, MEMORY);
}

#[test]
fn a_source_that_resumes_after_the_commit_is_found() {
    assert_found(Plant::ResumeAfterCommit, &["runs twice", "and runs here"]);
}

#[test]
fn an_older_copy_of_an_owed_page_that_stays_is_found() {
    assert_found(Plant::KeepStaleCopies, MEMORY);
}

#[test]
fn an_owed_page_installed_twice_is_found() {
    assert_found(Plant::NoDemand, MEMORY);
}

#[test]
fn a_source_that_comes_back_and_forgets_what_was_lost_on_the_way_is_found() {
    assert_found(Plant::ServeOnlyUnsent, &["nothing will ever happen again"]);
}

#[test]
fn a_source_that_resumes_after_it_was_detached_is_found() {
    assert_found(Plant::ResumeAfterDetach, &["runs twice", "and runs here"]);
}

#[test]
fn a_destination_that_counts_pages_of_older_rounds_as_here_is_found() {
    assert_found(Plant::ClaimOldPages, &[MEMORY, &["dirty bits lost"]].concat());
}

#[test]
fn a_commit_of_an_old_link_that_is_taken_after_the_source_came_back_is_found() {
    let words = &["runs twice", "nobody broke the protocol"];
    assert_found(Plant::TakeLateCommit, &[MEMORY, words].concat());
}

#[test]
fn an_old_copy_that_is_not_the_one_of_the_digests_is_found() {
    assert_found(Plant::StaleCopy, MEMORY);
}

#[test]
fn a_page_compared_before_it_was_rearmed_is_found() {
    assert_found(Plant::CompareBeforeRearm, MEMORY);
}

#[test]
fn a_destination_that_does_not_say_what_its_old_copy_lacks_is_found() {
    assert_found(Plant::SilentlyLacking, MEMORY);
}

/// The checks above must be able to fail: with this fault planted, some seed does, and in each that does
/// it is one of the checks with these words.
fn assert_found(plant: Plant, words: &[&str]) {
    let mut found = 0;
    for seed in 0..2000 {
        let Err(why) = World::new(seed, plant).run() else { continue };
        assert!(words.iter().any(|w| why.contains(w)), "seed {seed} found {plant:?} by: {why}");
        found += 1;
    }
    assert!(found > 0, "no seed found {plant:?}");
}
