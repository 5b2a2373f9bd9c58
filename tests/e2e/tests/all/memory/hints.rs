//! A guest that says which of its pages are free, and is believed no more than it may be.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_memory::{GuestView, resident};
use ferry_migrate::{FreePages, Goals, Guest, Mode, OutcomeKind, PageSet, SendOptions};
use ferry_pages::{PAGE_BYTES, Run};
use ferry_process_guest::{ProcessGuest, Tracker};

use crate::stage::{Destination, Link, Maker, Process, eventually, migrate, pass_on};

const MIB: u64 = 1 << 20;

/// A guest whose pages outside its arena are the test's, who says of them what a guest would.
struct Claiming {
    guest: ProcessGuest,
    claims: Claims,
}

#[derive(Clone)]
struct Claims {
    view: GuestView,
    free: Run,
    taken_back: Run,
    written_later: Run,
    said: Arc<Mutex<Vec<&'static str>>>,
}

fn fill(view: &GuestView, run: Run, byte: u8) {
    (run.start..run.end()).for_each(|gfn| view.write(gfn, &[byte; PAGE_BYTES]).unwrap());
}

impl FreePages for Claims {
    fn begin(&mut self) {
        self.said.lock().unwrap().push("begin");
    }

    fn take(&mut self, into: &mut PageSet) {
        let mut said = self.said.lock().unwrap();
        if said.last() != Some(&"begin") {
            return;
        }
        said.push("claimed");
        // The claim was made, and is old when it is read: the guest took these pages back and wrote to them.
        fill(&self.view, self.taken_back, 2);
        into.extend([self.free, self.taken_back, self.written_later]);
    }

    fn end(&mut self) {
        self.said.lock().unwrap().push("end");
        fill(&self.view, self.written_later, 3);
    }
}

impl Guest for Claiming {
    pass_on!(spec memory dirty_sources pause resume save load);

    fn free_pages(&mut self) -> Option<Box<dyn FreePages>> {
        Some(Box::new(self.claims.clone()))
    }
}

#[test]
fn a_page_called_free_is_left_out_only_if_it_was_not_written_since() {
    let maker = Process {
        tracker: Tracker::UffdWriteProtect,
        memory_bytes: 64 * MIB,
        workload: "pattern=working-set set=1M arena=16M fill=all rate=1000".into(),
    };
    let guest = maker.busy_guest();
    let first = guest.arena().end() + 100;
    let [free, taken_back, written_later] = [0, 1000, 2000].map(|at| Run::new(first + at, 1000));
    let view = guest.memory();
    for run in [free, taken_back, written_later] {
        fill(&view, run, 1);
    }
    let said = Arc::new(Mutex::new(Vec::new()));
    let claims = Claims { view: view.clone(), free, taken_back, written_later, said: said.clone() };
    let mut source = Claiming { guest, claims };
    let destination = Destination::start(Link::Memory, maker.host());
    let goals = Goals {
        max_downtime: Duration::from_secs(2),
        max_total: Duration::from_secs(60),
        ..Goals::default()
    };
    let options = SendOptions { goals, mode: Mode::PreCopy, lanes: 1, ..SendOptions::default() };
    let sent = migrate(&mut source, &destination.connector, &options);
    let report = &sent.report;
    assert_eq!(report.outcome, OutcomeKind::Completed, "{}", report.reason);
    assert!(report.digest_verified && !report.memory_differs, "{}", report.reason);
    assert_eq!(*said.lock().unwrap(), ["begin", "claimed", "end"]);
    let (arrived, _) = destination.arrival().expect("a machine");
    let there = arrived.memory();
    let mut page = vec![0; PAGE_BYTES];
    for (run, byte) in [(taken_back, 2), (written_later, 3)] {
        for gfn in run.start..run.end() {
            there.read(gfn, &mut page).unwrap();
            assert!(page.iter().all(|found| *found == byte), "page {gfn:#x} is {}", page[0]);
        }
    }
    assert_eq!(report.pages.free, free.pages);
    assert_eq!(resident(there.regions()).unwrap().count_in(free), 0);
    eventually("the guest goes on", || arrived.corrupt().is_none());
}
