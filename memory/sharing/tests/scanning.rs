//! The scanner reads what lasts, once, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ferry_dirtylog::{DirtySource, UffdWriteProtect};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_sharing::{Between, MachineNo, Scanner, Tenant, page_hash};

const PAGES: u64 = 1024;
const QUIET_PASSES: usize = 2;

fn machine(mapping: Mapping) -> GuestView {
    GuestView::of(vec![(0, mapping)]).unwrap()
}

fn private() -> GuestView {
    machine(Mapping::anonymous(PAGES).unwrap())
}

/// A page full of `byte`.
fn fill(view: &GuestView, gfn: u64, byte: u8) {
    view.write(gfn, &[byte; PAGE_BYTES]).unwrap();
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    pages.into_iter().map(|gfn| Run::new(gfn, 1)).collect()
}

fn watched(views: &[GuestView]) -> (Scanner, Vec<MachineNo>) {
    let mut scanner = Scanner::new(Between::OneTenant, QUIET_PASSES).unwrap();
    let add = |view: &GuestView| scanner.add(view.clone(), Tenant::default()).unwrap();
    let machines = views.iter().map(add).collect();
    (scanner, machines)
}

#[test]
fn each_page_that_lasts_is_read_once_and_then_only_what_changed() {
    let view = private();
    for gfn in 0..100 {
        fill(&view, gfn, 1 + (gfn % 50) as u8);
    }
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    let none = PageSet::new();
    // What is written before the pass; pages scanned, unstable, held, equal after it.
    for (turn, (written, scanned, unstable, held, equal)) in [
        (none.clone(), 0, 100, 0, 0),
        (none.clone(), 0, 100, 0, 0),
        (none.clone(), 100, 0, 100, 50),
        (none.clone(), 0, 0, 100, 50),
        (set([0, 7]), 0, 2, 98, 48),
        (set([7]), 0, 2, 98, 48),
        (none.clone(), 1, 1, 99, 49),
        (none.clone(), 1, 0, 100, 50),
    ]
    .into_iter()
    .enumerate()
    {
        let pass = scanner.pass(machines[0], &written).unwrap();
        let counts = scanner.census().counts();
        let found = (pass.scanned_pages, pass.unstable_pages, counts.held, counts.equal);
        assert_eq!(found, (scanned, unstable, held, equal), "pass {turn}");
    }
    assert_eq!(scanner.unwritten(machines[0]), set(0..100));
}

#[test]
fn a_page_that_is_written_all_the_time_is_never_read() {
    let view = private();
    for gfn in 0..10 {
        fill(&view, gfn, 1);
    }
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    let mut scanned = 0;
    for _ in 0..10 {
        scanned += scanner.pass(machines[0], &set(0..5)).unwrap().scanned_pages;
    }
    assert_eq!(scanned, 5);
    assert_eq!(scanner.unwritten(machines[0]), set(5..10));
}

#[test]
fn equal_pages_of_several_machines_are_found_and_bytes_are_compared() {
    let views = [private(), machine(Mapping::memfd("sharing", PAGES).unwrap())];
    for view in &views {
        for gfn in 0..20u8 {
            fill(view, u64::from(gfn), gfn);
        }
    }
    let (mut scanner, machines) = watched(&views);
    let mut compared = 0;
    for _ in 0..=QUIET_PASSES {
        for no in &machines {
            compared += scanner.pass(*no, &PageSet::new()).unwrap().compared_pages;
        }
    }
    let counts = scanner.census().counts();
    assert_eq!((counts.held, counts.zero, counts.equal, counts.odd), (40, 2, 19, 0));
    // One of eight that have an equal.
    assert_eq!(compared, 2);
    assert_eq!(scanner.census().zeros(machines[1]), set([0]));
    scanner.remove(machines[0]);
    assert_eq!(scanner.census().counts().equal, 0);
}

/// One of many pages that have one hash. XXH3 adds up, for each eight bytes of two stripes of 64, the bytes and
/// the product of their halves, each half XORed with a word of its secret, which is known: where that makes a half
/// zero, so is the product, and the other half can be moved from one stripe to the other.
fn with_one_hash(which: u8) -> Vec<u8> {
    let mut page = vec![0; PAGE_BYTES];
    page[..4].copy_from_slice(&[0xb8, 0xfe, 0x6c, 0x39]);
    page[64..68].copy_from_slice(&[0x7c, 0x01, 0x81, 0x2c]);
    (page[4], page[68]) = (which, u8::MAX - which);
    page
}

#[test]
fn once_pages_with_one_hash_were_found_to_differ_all_are_compared() {
    let view = private();
    view.write(0, &with_one_hash(0)).unwrap();
    // 8 is one of those that are compared in any case.
    for (gfn, which) in [(8, 1), (100, 2), (101, 3), (102, 0)] {
        view.write(gfn, &with_one_hash(which)).unwrap();
        assert_eq!(page_hash(&with_one_hash(which)), page_hash(&with_one_hash(0)));
    }
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    for _ in 0..=QUIET_PASSES {
        scanner.pass(machines[0], &PageSet::new()).unwrap();
    }
    let counts = scanner.census().counts();
    assert_eq!((counts.held, counts.odd, counts.equal), (5, 3, 1));
}

#[test]
fn a_page_that_was_just_written_says_nothing_of_those_that_were_equal_to_it() {
    let view = private();
    fill(&view, 0, 1);
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    for turn in 0..=2 * QUIET_PASSES {
        if turn == QUIET_PASSES {
            fill(&view, 8, 1);
        }
        if turn == 2 * QUIET_PASSES {
            // Its tracker tells so after this pass, in which page 8 is compared with it.
            fill(&view, 0, 2);
        }
        scanner.pass(machines[0], &PageSet::new()).unwrap();
    }
    assert_eq!((scanner.census().counts().held, scanner.census().counts().odd), (2, 0));
    scanner.pass(machines[0], &set([0])).unwrap();
    fill(&view, 100, 1);
    for _ in 0..=QUIET_PASSES {
        scanner.pass(machines[0], &PageSet::new()).unwrap();
    }
    let counts = scanner.census().counts();
    assert_eq!((counts.held, counts.odd, counts.equal), (3, 0, 1));
}

#[test]
fn scanning_brings_no_page_into_being_and_forgets_those_that_were_given_back() {
    let view = private();
    for gfn in 0..10 {
        fill(&view, gfn, 9);
    }
    // Read, never written: it shows the page of zeros.
    view.read(500, &mut [0]).unwrap();
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    for _ in 0..=QUIET_PASSES {
        scanner.pass(machines[0], &PageSet::new()).unwrap();
    }
    assert_eq!(scanner.census().counts().held, 10);
    assert_eq!(view.resident().unwrap(), set(0..10));
    view.discard(Run::new(0, 4)).unwrap();
    let pass = scanner.pass(machines[0], &PageSet::new()).unwrap();
    assert_eq!((pass.scanned_pages, scanner.census().counts().held), (0, 6));
    assert_eq!(scanner.unwritten(machines[0]), set(4..10));
    // What came since is new, whoever brought it.
    fill(&view, 2, 9);
    for _ in 0..=QUIET_PASSES {
        scanner.pass(machines[0], &PageSet::new()).unwrap();
    }
    assert_eq!(scanner.census().counts().held, 7);
}

#[test]
fn what_a_running_writer_does_is_never_counted_as_it_was() {
    let view = private();
    for gfn in 0..PAGES {
        fill(&view, gfn, 1);
    }
    let mut tracker = match UffdWriteProtect::new(view.regions().to_vec()) {
        Ok(tracker) => tracker,
        Err(e) => return println!("SKIP: {e}: {}", e.source),
    };
    tracker.start().unwrap();
    let (mut scanner, machines) = watched(std::slice::from_ref(&view));
    let ends = Arc::new(AtomicBool::new(false));
    // One page after the other becomes 2, while passes go on.
    let writer = std::thread::spawn({
        let (view, ends) = (view.clone(), ends.clone());
        move || {
            for gfn in (0..PAGES).filter(|gfn| gfn % 3 == 0) {
                fill(&view, gfn, 2);
                std::thread::yield_now();
            }
            ends.store(true, Ordering::Release);
        }
    });
    let pass = |scanner: &mut Scanner, tracker: &mut UffdWriteProtect| {
        let mut written = PageSet::new();
        tracker.collect(&mut written).unwrap();
        scanner.pass(machines[0], &written).unwrap();
    };
    while !ends.load(Ordering::Acquire) {
        pass(&mut scanner, &mut tracker);
    }
    writer.join().unwrap();
    for _ in 0..=QUIET_PASSES {
        pass(&mut scanner, &mut tracker);
    }
    // All pages are held, in two groups: of ones and of twos.
    let counts = scanner.census().counts();
    assert_eq!((counts.held, counts.equal, counts.odd), (PAGES, PAGES - 2, 0));
}
