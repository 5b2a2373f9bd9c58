//! A pager under real userfaultfd: threads touch memory, another one brings it.
#![expect(unsafe_code, reason = "a view of memory that the test owns")]

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_memory::{GuestView, Mapping};
use ferry_pager::{Notice, Pager};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

const PAGES: u64 = 2048;

struct Machine {
    view: GuestView,
    name: &'static str,
}

/// One machine of private memory and one of shared memory.
fn machines() -> Vec<Machine> {
    let make = |name, mapping: Mapping| {
        // SAFETY: the mapping is what the region says, and the view keeps it; only the view reaches it.
        let view = unsafe { GuestView::new(vec![mapping.region(100, 0)]) }.unwrap();
        Machine { view: view.keeping(mapping), name }
    };
    vec![
        make("private", Mapping::anonymous(PAGES).unwrap()),
        make("shared", Mapping::memfd("pager-test", PAGES).unwrap()),
    ]
}

fn page(gfn: u64) -> Vec<u8> {
    gfn.to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn read(view: &GuestView, gfn: u64) -> Vec<u8> {
    let mut bytes = vec![0xaa; PAGE_BYTES];
    view.read(gfn, &mut bytes).unwrap();
    bytes
}

fn start(machine: &Machine, owed: PageSet) -> (Pager, Receiver<Notice>) {
    let (sender, notices) = channel();
    let pager = Pager::start(&machine.view, owed, move |notice| sender.send(notice).unwrap());
    (pager.unwrap(), notices)
}

fn one_run(start: u64, pages: u64) -> PageSet {
    std::iter::once(Run::new(start, pages)).collect()
}

#[test]
fn every_page_is_seen_as_it_came_and_is_asked_for_once_however_many_wait() {
    for machine in machines() {
        let owed = one_run(100, PAGES / 2);
        let (pager, notices) = start(&machine, owed);
        let pager = Arc::new(pager);
        let source = std::thread::spawn({
            let pager = pager.clone();
            move || {
                let mut asked = HashMap::new();
                loop {
                    match notices.recv_timeout(Duration::from_secs(20)).expect("a notice") {
                        Notice::Ask(gfns) => {
                            for gfn in gfns {
                                *asked.entry(gfn).or_insert(0) += 1;
                                pager.install(gfn, &page(gfn), |_| {}).unwrap();
                            }
                        }
                        Notice::Complete => return asked,
                        Notice::Broken(why) => panic!("{why}"),
                    }
                }
            }
        });
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let view = machine.view.clone();
                std::thread::spawn(move || {
                    for i in 0..PAGES {
                        // Each in another order, all pages between them.
                        let gfn = 100 + (i * (2 * reader + 1)) % PAGES;
                        let expected =
                            if gfn < 100 + PAGES / 2 { page(gfn) } else { vec![0; PAGE_BYTES] };
                        assert_eq!(read(&view, gfn), expected, "frame {gfn}");
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.join().unwrap();
        }
        let asked = source.join().unwrap();
        assert_eq!(asked.len() as u64, PAGES / 2, "{}", machine.name);
        assert!(asked.values().all(|times| *times == 1), "{}: {asked:?}", machine.name);
        let waits = pager.waits();
        assert_eq!(waits.counts.requested, PAGES / 2);
        assert_eq!(waits.nanos.len(), PAGES / 2);
        assert!(!waits.by_thread.is_empty());
    }
}

#[test]
fn a_late_page_does_not_overwrite_what_was_written_since() {
    for machine in machines() {
        let (pager, notices) = start(&machine, one_run(100, 64));
        let mut taken = Vec::new();
        let old: Vec<u8> = (100..164).flat_map(page).collect();
        pager.install(110, &page(110), |gfn| taken.push(gfn)).unwrap();
        machine.view.write(110, &page(7777)).unwrap();
        pager.install(100, &old, |gfn| taken.push(gfn)).unwrap();
        assert_eq!(read(&machine.view, 110), page(7777), "{}", machine.name);
        assert_eq!(read(&machine.view, 163), page(163));
        taken.sort_unstable();
        assert_eq!(taken, (100..164).collect::<Vec<_>>(), "each is taken once");
        assert!(matches!(notices.try_recv(), Ok(Notice::Complete)));
        assert_eq!(pager.waits().counts.late, 1);
    }
}

#[test]
fn older_copies_of_owed_pages_are_never_seen() {
    for machine in machines() {
        machine.view.write(105, &page(1)).unwrap();
        machine.view.write(106, &page(2)).unwrap();
        let (pager, _notices) = start(&machine, one_run(105, 1));
        assert_eq!(read(&machine.view, 106), page(2), "not owed: as it was");
        pager.install(105, &page(105), |_| {}).unwrap();
        assert_eq!(read(&machine.view, 105), page(105), "{}", machine.name);
    }
}

#[test]
fn a_page_that_the_guest_gave_back_stays_zero_whatever_still_comes() {
    for machine in machines() {
        let (pager, _notices) = start(&machine, one_run(100, 64));
        pager.install(100, &page(100), |_| {}).unwrap();
        // A balloon: the pager's thread has to read this before it returns.
        machine.view.discard(Run::new(100, 32)).unwrap();
        let old: Vec<u8> = (100..164).flat_map(page).collect();
        let mut taken = PageSet::new();
        pager.install(100, &old, |gfn| assert!(taken.insert(gfn))).unwrap();
        for gfn in 100..132 {
            assert_eq!(read(&machine.view, gfn), vec![0; PAGE_BYTES], "{} {gfn}", machine.name);
        }
        assert_eq!(taken, one_run(132, 32));
        assert!(pager.missing().is_empty());
    }
}

#[test]
fn discards_and_installs_at_once_neither_hang_nor_bring_old_content_back() {
    for machine in machines() {
        let (pager, _notices) = start(&machine, one_run(100, PAGES));
        let pager = Arc::new(pager);
        let gone = Arc::new(Mutex::new(PageSet::new()));
        let balloon = std::thread::spawn({
            let (view, gone) = (machine.view.clone(), gone.clone());
            move || {
                for i in 0..PAGES / 8 {
                    let run = Run::new(100 + (i * 37 % (PAGES / 4)) * 4, 4);
                    view.discard(run).unwrap();
                    gone.lock().unwrap().insert_run(run);
                }
            }
        });
        let old: Vec<u8> = (100..100 + PAGES).flat_map(page).collect();
        pager.install(100, &old, |_| {}).unwrap();
        balloon.join().unwrap();
        let gone = gone.lock().unwrap();
        for gfn in 100..100 + PAGES {
            let expected = if gone.contains(gfn) { vec![0; PAGE_BYTES] } else { page(gfn) };
            assert_eq!(read(&machine.view, gfn), expected, "{} {gfn}", machine.name);
        }
    }
}

#[test]
fn zeros_are_installed_as_zeros_and_memory_is_plain_when_the_pager_is_gone() {
    for machine in machines() {
        let (pager, notices) = start(&machine, one_run(100, 8));
        pager.install_zeros(Run::new(100, 8), |_| {}).unwrap();
        assert!(matches!(notices.try_recv(), Ok(Notice::Complete)));
        assert_eq!(read(&machine.view, 103), vec![0; PAGE_BYTES]);
        drop(pager);
        machine.view.write(150, &page(1)).unwrap();
        assert_eq!(read(&machine.view, 150), page(1), "{}", machine.name);
        let (again, _notices) = start(&machine, one_run(150, 1));
        assert_eq!(again.missing(), one_run(150, 1));
        again.install(150, &page(150), |_| {}).unwrap();
    }
}

#[test]
fn pages_that_the_machine_does_not_have_are_an_error() {
    for machine in machines() {
        let (pager, _notices) = start(&machine, one_run(100 + PAGES - 1, 1));
        assert!(pager.install(5000, &page(1), |_| {}).is_ok(), "not owed: dropped unseen");
        assert_eq!(pager.missing().len(), 1);
    }
}
