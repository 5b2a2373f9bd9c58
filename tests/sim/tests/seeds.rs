//! What the simulator must see: that the protocol keeps every rule, and that each fault which is planted is found
//! by the rule that it breaks. `make sim SEEDS=n` runs more seeds, and `make sim SEED=n` replays one.

use std::cell::RefCell;
use std::rc::Rc;

use ferry_sim::{End, Plant, Rule, Runs, World};

const SEEDS: u64 = 20_000;

#[test]
fn every_seed_keeps_every_rule_and_every_end_is_seen() {
    let tally = Runs::new(0, SEEDS, Plant::Nothing).run();
    let tally = tally.unwrap_or_else(|f| {
        panic!("{}\nsee all of it: make sim SEED={}", f.broken, f.seed);
    });
    println!("{tally:?}");
    // The network must be bad enough that every way to end is seen.
    for end in End::ALL {
        assert!(tally.contains_key(&end), "no seed ended with {end:?}: {tally:?}");
    }
}

#[test]
fn a_quiet_network_always_moves_the_machine() {
    for seed in 0..300 {
        let end = World::quiet(seed).run();
        let moved = [End::Moved, End::MovedByPostCopy, End::MovedThereAndBack];
        assert!(end.as_ref().is_ok_and(|end| moved.contains(end)), "seed {seed}: {end:?}");
    }
}

#[test]
fn a_seed_that_is_replayed_does_the_same_again() {
    let heard = |seed| {
        let lines = Rc::new(RefCell::new(Vec::new()));
        let kept = lines.clone();
        let hear = Box::new(move |line: &str| kept.borrow_mut().push(line.to_owned()));
        let end = World::new(seed, Plant::Nothing).heard_by(hear).run();
        (lines.take(), format!("{end:?}"))
    };
    for seed in 0..50 {
        let (lines, end) = heard(seed);
        assert!(lines.len() > 2 && (lines, end) == heard(seed), "seed {seed}");
        assert_eq!(format!("{:?}", World::new(seed, Plant::Nothing).run()), heard(seed).1);
    }
}

/// The checks must be able to fail: with this fault planted, some seed does, and each that does breaks one
/// of these rules.
fn assert_found(plant: Plant, by: &[Rule]) {
    let mut found = 0;
    // A few are rare.
    for seed in 0..10 * SEEDS {
        if found > 0 && seed >= SEEDS {
            break;
        }
        let Err(broken) = World::new(seed, plant).run() else { continue };
        assert!(by.contains(&broken.rule), "seed {seed} found {plant:?} by: {broken}");
        found += 1;
        if found == 20 || seed >= 4000 {
            return;
        }
    }
    assert!(found > 0, "no seed found {plant:?}");
    println!("{found} seeds found {plant:?}");
}

/// `name: fault by rule or rule`.
macro_rules! found {
    ($($name:ident: $plant:ident by $($rule:ident)or+;)*) => {
        mod planted_and_found {
            use super::*;
            $(
                #[test]
                fn $name() {
                    assert_found(Plant::$plant, &[$(Rule::$rule),+]);
                }
            )*

            #[test]
            fn every_fault_has_a_test() {
                let tested = [Plant::Nothing, $(Plant::$plant),*];
                for plant in <Plant as clap::ValueEnum>::value_variants() {
                    assert!(tested.contains(plant), "{plant:?}");
                }
            }
        }
    };
}

found! {
    double_permit: DoublePermit by OneRuns;
    resume_after_commit: ResumeAfterCommit by OneRuns;
    resume_after_detach: ResumeAfterDetach by OneRuns;
    spool_that_runs_its_machine: SpoolRuns by OneRuns;
    verdict_given_while_it_may_still_run: VerdictTooEarly by OneRuns;
    commit_of_an_old_link_taken: TakeLateCommit by OneRuns or LastVersion or Peace or NoLostBit;
    events_of_old_links_counted: OldLinksCount by Peace or AckAfterInstall or OneRuns or LastVersion or NoLostBit;
    dropped_dirty_bit: DropHarvestedBit by NoLostBit;
    no_harvest_after_save: SkipHarvestAfterSave by NoLostBit;
    copy_before_rearm: CopyBeforeRearm by NoLostBit;
    straggling_lane_rearms: StragglerRearms by NoLostBit;
    dropped_debt: DroppedDebt by NoLostBit or AckAfterInstall;
    debt_not_given_back: DropReturned by NoLostBit;
    vcpus_held_back_for_ever: HeldBack by TrueEnd;
    ack_before_install: AckBeforeInstall by AckAfterInstall;
    duplicates_counted: CountDuplicates by AckAfterInstall or Peace or LastVersion or Progress;
    commit_without_the_last_batch: CommitWithoutLastBatch by LastVersion or Progress;
    old_pages_claimed_as_new: ClaimOldPages by NoLostBit;
    ledger_not_asked: NoLedger by NoLateOverwrite or AckAfterInstall;
    more_given_back_than_is_stale: ClearMore by LastVersion or NoLostBit;
    stale_copies_of_owed_pages_kept: KeepStaleCopies by LastVersion or NoLostBit;
    late_rounds_taken_after_the_hand_over: TakeLateRounds by LastVersion or NoLostBit;
    demand_not_asked: NoDemand by NoLateOverwrite or LastVersion;
    only_unsent_served_again: ServeOnlyUnsent by NoLostBit or Progress or Peace;
    forgotten_when_sent: ForgetWhenSent by NoLostBit;
    verdict_forgotten: VerdictForgotten by Progress;
    spool_before_save: SpoolBeforeSave by NoLostBit;
    spool_half_written: SpoolHalfWritten by NoLostBit;
    spool_of_an_old_commit: SpoolOfOldCommit by NoLostBit;
    spool_removed_early: SpoolRemovedEarly by NoLostBit;
    stale_base_in_return_trip: StaleBase by LastVersion or NoLostBit;
    compared_before_rearm: CompareBeforeRearm by NoLostBit;
    lacking_not_said: SilentlyLacking by AckAfterInstall or NoLostBit;
}
