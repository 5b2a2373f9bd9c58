//! One suite of rules, held by every backend on every kind of machine that it can watch.

#[path = "../../../memory/tests/host/huge_pages.rs"]
mod huge_pages;
mod kvm_machine;
mod plain_machine;
mod suite;

use std::sync::Arc;

use ferry_pages::Run;
use kvm_machine::{KvmMachine, Rings};
use plain_machine::PlainMachine;
use suite::{EXTENTS, Kind, Machine};

/// Makes a test of each rule for a machine; a machine that cannot be made here says why and skips.
macro_rules! held_by {
    ($machine:ident: $($rule:ident)* => $make:expr) => {
        mod $machine {
            use super::*;
            held_by!(@rules $make; $($rule)*);
        }
    };
    ($($machine:ident => $make:expr;)*) => { $(
        mod $machine {
            use super::*;
            held_by!(@rules $make;
                earlier_writes_are_not_reported
                every_page_written_is_reported_and_no_other
                a_page_is_reported_again_only_when_written_again
                dense_writes_are_reported_to_the_last_page
                no_write_of_a_running_machine_is_lost
                a_write_after_rearm_is_reported_again
                untouched_pages_stay_untouched
                tracking_starts_again_after_it_stopped
                tracking_ends_when_the_tracker_is_dropped
                a_look_at_what_is_touched_hides_no_write
            );
        }
    )* };
    (@rules $make:expr; $($rule:ident)*) => { $(
        #[test]
        fn $rule() {
            if let Some(mut machine) = $make {
                suite::$rule(&mut machine);
            }
        }
    )* };
}

held_by! {
    software_bitmap => PlainMachine::marked();
    software_bitmap_of_vm_memory => PlainMachine::vm_memory();
    uffd_private => PlainMachine::write_protected(Kind::Private);
    uffd_memfd => PlainMachine::write_protected(Kind::Shared);
    kvm_bitmap => KvmMachine::new(Rings::None, Kind::Private, KvmMachine::bitmap);
    kvm_bitmap_memfd => KvmMachine::new(Rings::None, Kind::Shared, KvmMachine::bitmap);
    kvm_bitmap_without_manual_protect => KvmMachine::new(Rings::None, Kind::Private, KvmMachine::plain_bitmap);
    kvm_ring => KvmMachine::new(Rings::Of(1024), Kind::Private, KvmMachine::ring);
    kvm_ring_memfd => KvmMachine::new(Rings::Of(1024), Kind::Shared, KvmMachine::ring);
    kvm_ring_in_ring_0 => ring_0();
    kvm_uffd_private => KvmMachine::new(Rings::None, Kind::Private, KvmMachine::write_protected);
    kvm_uffd_memfd => KvmMachine::new(Rings::None, Kind::Shared, KvmMachine::write_protected);
}

// Huge pages are there as a whole; KVM logs their parts.
held_by! { kvm_bitmap_huge:
    earlier_writes_are_not_reported
    every_page_written_is_reported_and_no_other
    no_write_of_a_running_machine_is_lost
    a_write_after_rearm_is_reported_again
    tracking_starts_again_after_it_stopped
    => KvmMachine::new(Rings::None, Kind::Huge, KvmMachine::bitmap)
}
held_by! { kvm_ring_huge:
    every_page_written_is_reported_and_no_other
    no_write_of_a_running_machine_is_lost
    => KvmMachine::new(Rings::Of(1024), Kind::Huge, KvmMachine::ring)
}
held_by! { uffd_huge:
    huge_pages_written_are_reported_as_a_whole_and_no_other
    no_write_of_a_running_machine_is_lost
    => PlainMachine::write_protected(Kind::Huge)
}

/// Rings hold fewer entries than the machine has pages, and nobody collects while it writes all of them.
#[test]
fn a_full_ring_loses_no_page() {
    let Some(mut machine) = KvmMachine::new(Rings::Of(1024), Kind::Private, KvmMachine::ring)
    else {
        return;
    };
    let mut source = machine.source();
    source.start().unwrap();
    for _ in 0..2 {
        let before = machine.rings_were_full();
        machine.write(&EXTENTS);
        assert!(
            machine.rings_were_full() > before,
            "the rings never filled: the test shows nothing"
        );
        let reported = suite::collect(source.as_mut());
        assert_eq!(reported, EXTENTS.into_iter().collect());
    }
}

/// A machine whose dirty rings overflow where KVM emulates ring 0: it has four times as many pages.
fn ring_0() -> Option<KvmMachine> {
    let machine = KvmMachine::new(Rings::Of(1024), Kind::Private, KvmMachine::ring)?;
    machine.set_ring(0);
    Some(machine)
}

/// Also when nobody collects for long, and the vCPUs have dirtied many times what their rings hold.
#[test]
fn a_ring_that_overflows_loses_no_page_and_no_vcpu() {
    let Some(mut machine) = ring_0() else { return };
    let mut source = machine.source();
    source.start().unwrap();
    let few = [Run::new(EXTENTS[0].start + 7, 3), Run::new(EXTENTS[1].start + 900, 40)];
    for sweeps in [1, 2, 1, 30, 1] {
        // Both at once: none is helped by what is done for the other.
        for _ in 0..sweeps {
            machine.write_during(&EXTENTS, &mut std::thread::yield_now);
        }
        let exits = machine.rings_were_full();
        assert_eq!(suite::collect(source.as_mut()), suite::all(), "{sweeps} sweeps");
        // In step again at once: no entry is read twice, none is missed.
        for turn in 0..3 {
            machine.write(&few);
            let reported = suite::collect(source.as_mut());
            assert_eq!(reported, few.into_iter().collect(), "{sweeps} sweeps, turn {turn}");
        }
        println!("{sweeps} sweeps: stopped {exits} times");
    }
    source.stop().unwrap();
    machine.write(&EXTENTS);
}

/// Ring 3 writes where ring 0 has pushed its entries out of the ring: nothing but the collect after the
/// overflow has these pages logged again. And a vCPU in ring 3 stops at a ring that counts as full.
#[test]
fn a_page_whose_entry_was_lost_is_logged_again() {
    let Some(mut machine) = ring_0() else { return };
    let mut source = machine.source();
    source.start().unwrap();
    let few = [Run::new(EXTENTS[0].start, 60), Run::new(EXTENTS[1].start, 400)];
    let others = [Run::new(EXTENTS[0].start + 60, 964), Run::new(EXTENTS[1].start + 400, 2600)];
    for turn in 0..6 {
        machine.set_ring(3);
        machine.write(&few);
        machine.set_ring(0);
        (0..turn).for_each(|_| machine.write_during(&others, &mut std::thread::yield_now));
        machine.write(&others);
        if turn % 2 == 1 {
            machine.set_ring(3);
            machine.write(&few);
        }
        assert_eq!(suite::collect(source.as_mut()), suite::all(), "turn {turn}");
        machine.set_ring(3);
        machine.write(&few);
        assert_eq!(suite::collect(source.as_mut()), few.into_iter().collect(), "turn {turn}");
    }
}

/// Harvests that come too late, and at any moment of an overflow.
#[test]
fn an_overflow_between_harvests_loses_no_page() {
    let Some(mut machine) = ring_0() else { return };
    let mut rests = (0..40).cycle().map(|i| std::time::Duration::from_millis(i * 17 % 40));
    for _ in 0..3 {
        suite::nothing_is_lost(&mut machine, &mut || {
            rests.by_ref().take(1).for_each(std::thread::sleep)
        });
    }
}

/// What a ring lost is made up for also when tracking starts anew.
#[test]
fn an_overflow_does_not_outlast_its_tracker() {
    let Some(mut machine) = ring_0() else { return };
    for _ in 0..3 {
        let mut source = machine.source();
        source.start().unwrap();
        machine.write(&EXTENTS);
        source.stop().unwrap();
        source.start().unwrap();
        assert!(suite::collect(source.as_mut()).is_empty());
        let few = [Run::new(EXTENTS[1].start + 100, 50), Run::new(EXTENTS[0].start, 5)];
        machine.write(&few);
        assert_eq!(suite::collect(source.as_mut()), few.into_iter().collect());
    }
}

/// With rings enabled and nothing tracking, the machine runs as any other.
#[test]
fn rings_that_nobody_reads_do_not_stop_the_machine() {
    let Some(mut machine) = KvmMachine::new(Rings::Of(1024), Kind::Private, KvmMachine::ring)
    else {
        return;
    };
    machine.write(&EXTENTS);
    assert_eq!(machine.rings_were_full(), 0);
}

/// Pages that hold nothing when tracking starts are clean, although every bit begins as set.
#[test]
fn an_initially_set_bitmap_reports_only_populated_pages() {
    let Some(mut machine) = KvmMachine::new(Rings::None, Kind::Private, KvmMachine::bitmap) else {
        return;
    };
    let written = [Run::new(EXTENTS[1].start + 5, 70)];
    machine.write(&written);
    let populated = suite::populated(&machine);
    let mut source = machine.source();
    source.start().unwrap();
    let mut beyond = suite::collect(source.as_mut());
    beyond.subtract(&populated);
    assert!(beyond.is_empty(), "{beyond:?}");
}

/// A frame that the machine does not have is nobody's, and marking it is harmless.
#[test]
fn marks_outside_of_memory_are_ignored() {
    use ferry_dirtylog::{DirtySource, SoftwareBitmap};
    use ferry_pages::PageSet;
    let mut bitmap = Arc::new(SoftwareBitmap::new(EXTENTS));
    bitmap.start().unwrap();
    bitmap.mark(EXTENTS[0].end());
    bitmap.mark(u64::MAX);
    bitmap.mark_run(Run::new(EXTENTS[1].end() - 1, u64::MAX));
    bitmap.mark_range((EXTENTS[1].start * 4096) - 1, 2);
    bitmap.mark_range(0, 0);
    bitmap.mark_range(u64::MAX, u64::MAX);
    let mut pages = PageSet::new();
    bitmap.collect(&mut pages).unwrap();
    let expected = [Run::new(EXTENTS[1].start, 1), Run::new(EXTENTS[1].end() - 1, 1)];
    assert_eq!(pages, expected.into_iter().collect());
}
