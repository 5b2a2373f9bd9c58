//! A pager under real userfaultfd: threads touch memory, another one brings it.
#![expect(unsafe_code, reason = "a view of memory that the test owns")]

#[path = "../../../memory/tests/host/huge_pages.rs"]
mod huge_pages;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use huge_pages::HugePages;

use ferry_memory::{GuestView, Mapping};
use ferry_pager::{Notice, Pager};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

const PAGES: u64 = 2048;

struct Machine {
    view: GuestView,
    name: &'static str,
    _host: Option<HugePages>,
}

impl Machine {
    fn new(name: &'static str, mapping: Mapping, host: Option<HugePages>) -> Self {
        // SAFETY: the mapping is what the region says, and the view keeps it; only the view reaches it.
        let view = unsafe { GuestView::new(vec![mapping.region(100, 0)]) }.unwrap();
        Self { view: view.keeping(mapping), name, _host: host }
    }

    /// Pages that the host holds together.
    fn unit(&self) -> u64 {
        self.view.regions()[0].unit
    }
}

fn huge() -> Option<Machine> {
    let host = HugePages::reserve(PAGES * PAGE_BYTES as u64)?;
    Some(Machine::new("huge", Mapping::huge(PAGES).unwrap(), Some(host)))
}

fn shared() -> (Machine, File) {
    let mapping = Mapping::memfd("pager-test", PAGES).unwrap();
    let file = File::from(mapping.fd().unwrap().try_clone_to_owned().unwrap());
    (Machine::new("shared", mapping, None), file)
}

/// A machine of each kind of memory.
fn machines() -> Vec<Machine> {
    let private = Machine::new("private", Mapping::anonymous(PAGES).unwrap(), None);
    [private, shared().0].into_iter().chain(huge()).collect()
}

fn page(gfn: u64) -> Vec<u8> {
    gfn.to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn read(view: &GuestView, gfn: u64) -> Vec<u8> {
    let mut bytes = vec![0xaa; PAGE_BYTES];
    view.read(gfn, &mut bytes).unwrap();
    bytes
}

/// A pager whose faults are read by a thread.
struct Serving {
    pager: Option<Pager>,
    reader: Option<JoinHandle<()>>,
}

impl Deref for Serving {
    type Target = Pager;

    fn deref(&self) -> &Pager {
        self.pager.as_ref().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.pager.take());
        // It holds the memory, which may be of huge pages that are about to be given back.
        self.reader.take().unwrap().join().unwrap();
    }
}

fn start(machine: &Machine, owed: PageSet) -> (Serving, Receiver<Notice>) {
    let (sender, notices) = channel();
    let notify = move |notice| drop(sender.send(notice));
    let (pager, faults) = Pager::start(&machine.view, owed, notify).unwrap();
    let reader = std::thread::spawn(move || faults.serve());
    (Serving { pager: Some(pager), reader: Some(reader) }, notices)
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
        assert_eq!(waits.counts.requested, PAGES / 2 / machine.unit());
        assert_eq!(waits.nanos.len(), PAGES / 2 / machine.unit());
        assert!(!waits.by_thread.is_empty());
    }
}

#[test]
fn a_late_page_does_not_overwrite_what_was_written_since() {
    for machine in machines() {
        let (pager, notices) = start(&machine, one_run(100, 64));
        let mut taken = Vec::new();
        let old: Vec<u8> = (100..164).flat_map(page).collect();
        if machine.unit() == 1 {
            pager.install(110, &page(110), |gfn| taken.push(gfn)).unwrap();
        } else {
            pager.install(100, &old, |gfn| taken.push(gfn)).unwrap();
        }
        machine.view.write(110, &page(7777)).unwrap();
        pager.install(100, &old, |gfn| taken.push(gfn)).unwrap();
        assert_eq!(read(&machine.view, 110), page(7777), "{}", machine.name);
        assert_eq!(read(&machine.view, 163), page(163));
        taken.sort_unstable();
        assert_eq!(taken, (100..164).collect::<Vec<_>>(), "each is taken once");
        assert!(matches!(notices.try_recv(), Ok(Notice::Complete)));
        assert!(pager.waits().counts.late > 0);
    }
}

#[test]
fn older_copies_of_owed_pages_are_never_seen() {
    for machine in machines() {
        machine.view.write(105, &page(1)).unwrap();
        machine.view.write(106, &page(2)).unwrap();
        let (pager, _notices) = start(&machine, one_run(105, 1));
        if machine.unit() == 1 {
            assert_eq!(read(&machine.view, 106), page(2), "not owed: as it was");
        }
        pager.install(105, &page(105), |_| {}).unwrap();
        assert_eq!(read(&machine.view, 105), page(105), "{}", machine.name);
        assert_eq!(read(&machine.view, 106), page(2), "{}: not owed: as it was", machine.name);
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

#[test]
fn a_huge_page_is_seen_when_all_of_it_is_here_and_not_before() {
    let Some(machine) = huge() else { return };
    let unit = machine.unit();
    // One that was there and is owed in part, one that never was.
    let old: Vec<u8> = (0..unit).flat_map(|_| page(1)).collect();
    machine.view.write(100, &old).unwrap();
    let owed: PageSet = [Run::new(130, 40), Run::new(100 + unit, unit)].into_iter().collect();
    let (pager, notices) = start(&machine, owed.clone());
    for (first, among) in [(100, Run::new(130, 40)), (100 + unit, Run::new(100 + unit, unit))] {
        let reader = std::thread::spawn({
            let view = machine.view.clone();
            move || read(&view, first + 7)
        });
        let Ok(Notice::Ask(asked)) = notices.recv_timeout(Duration::from_secs(20)) else {
            panic!("nobody was asked")
        };
        assert_eq!(asked, (among.start..among.end()).collect::<Vec<_>>());
        for gfn in (among.start..among.end()).rev() {
            assert!(!reader.is_finished(), "{gfn} is not here");
            pager.install(gfn, &page(gfn), |_| {}).unwrap();
        }
        let expected = if first == 100 { page(1) } else { page(first + 7) };
        assert_eq!(reader.join().unwrap(), expected);
    }
    for gfn in 100..100 + 2 * unit {
        let expected = if owed.contains(gfn) { page(gfn) } else { page(1) };
        assert_eq!(read(&machine.view, gfn), expected, "{gfn}");
    }
    assert!(matches!(notices.try_recv(), Ok(Notice::Complete)));
}

#[test]
fn every_huge_page_that_came_counts_as_resident_touched_or_not() {
    let Some(machine) = huge() else { return };
    let unit = machine.unit();
    let (pager, _notices) = start(&machine, one_run(100, 2 * unit));
    let all: Vec<u8> = (100..100 + 2 * unit - 1).flat_map(page).collect();
    pager.install(100, &all, |_| {}).unwrap();
    // The last one will not come: the machine is abandoned.
    drop(pager);
    assert_eq!(machine.view.resident().unwrap(), one_run(100, 2 * unit));
    assert_eq!(read(&machine.view, 101), page(101));
}

/// A minor fault: the file has the page, and the machine's mapping has not.
#[test]
fn a_page_that_only_the_file_has_is_shown_as_it_is() {
    let (machine, file) = shared();
    let (pager, _notices) = start(&machine, one_run(100, 4));
    file.write_all_at(&page(7), 10 * PAGE_BYTES as u64).unwrap();
    assert_eq!(read(&machine.view, 110), page(7));
    // Somebody was faster than the source; nothing is written over it.
    file.write_all_at(&page(8), PAGE_BYTES as u64).unwrap();
    pager.install(100, &[100, 101, 102, 103].map(page).concat(), |_| {}).unwrap();
    assert_eq!(read(&machine.view, 101), page(8));
    assert_eq!(read(&machine.view, 103), page(103));
}

/// A vCPU's thread that is told to end by a signal does so in the middle of its wait.
#[test]
fn a_thread_that_ends_while_it_waits_harms_nobody() {
    extern "C" fn end(_: libc::c_int) {
        // SAFETY: ends this thread only, which owns nothing.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    // SAFETY: the handler makes one system call, and nobody else uses the signal.
    unsafe { libc::signal(libc::SIGUSR1, end as *const () as libc::sighandler_t) };
    for machine in machines() {
        let (pager, notices) = start(&machine, one_run(100, 2));
        let (tell, thread) = channel();
        // It drops nothing when it ends: nothing is given to it.
        let at = machine.view.regions()[0].host;
        std::thread::spawn(move || {
            // SAFETY: takes nothing, returns a number.
            tell.send(unsafe { libc::gettid() }).unwrap();
            // SAFETY: a byte of memory that the test keeps.
            unsafe { std::ptr::with_exposed_provenance::<u8>(at).read_volatile() }
        });
        let thread = thread.recv().unwrap();
        assert!(matches!(notices.recv_timeout(Duration::from_secs(20)), Ok(Notice::Ask(_))));
        // SAFETY: a signal to a thread of this process, which waits for a page.
        assert_eq!(unsafe { libc::tgkill(libc::getpid(), thread, libc::SIGUSR1) }, 0);
        while std::path::Path::new(&format!("/proc/self/task/{thread}")).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let other = std::thread::spawn({
            let view = machine.view.clone();
            move || [read(&view, 100), read(&view, 101)]
        });
        pager.install(100, &[page(100), page(101)].concat(), |_| {}).unwrap();
        assert_eq!(other.join().unwrap(), [page(100), page(101)], "{}", machine.name);
        assert!(pager.outstanding().is_empty() && pager.missing().is_empty());
    }
}
