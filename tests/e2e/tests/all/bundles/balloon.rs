//! Balloons in bundles: what a guest gave back is in no bundle, and stays given back.

use std::sync::Arc;

use ferry_bundle::Chain;
use ferry_migrate::{Guest, LazyEvent, restore_lazily};
use ferry_process_guest::Tracker;
use ferry_refvmm::DirtyLog;
use tempfile::TempDir;

use super::engine::{MIB, kvm_machine, process, saved};
use crate::stage::{Ballooned, Kvm, Maker, Process, eventually, goes_on, has_kvm};

const MEMORY: u64 = 128 * MIB;
const WHOLE: &str = "pattern=random fill=all random=20";

fn reaches(guest: &impl Ballooned, target: u64) {
    guest.shall_have(target);
    eventually("the target is reached", || {
        guest.given() == MEMORY - target || guest.wrong().is_some()
    });
    assert_eq!((guest.wrong(), guest.trouble()), (None, None));
}

/// On a bundle that has the pages that the guest gave back since.
fn comes_back<M: Maker>(maker: &M)
where
    M::Subject: Ballooned,
{
    let dir = TempDir::new().unwrap();
    let (base, next) = (dir.path().join("base"), dir.path().join("next"));
    let mut guest = maker.busy_guest();
    saved(&mut guest, &base, None, false).unwrap();
    reaches(&guest, MEMORY / 4);
    goes_on(&guest, 100);
    saved(&mut guest, &next, Some(&base), true).unwrap();
    drop(guest);

    let chain = Arc::new(Chain::open(&next, &[]).unwrap());
    let (sender, events) = std::sync::mpsc::channel();
    let tell = move |event| drop(sender.send(event));
    let (restored, _fetching) = restore_lazily(&maker.host(), chain, "again", tell).unwrap();
    let mut guest = restored.guest;
    guest.resume(restored.permit).unwrap();
    goes_on(&guest, 4000);
    assert!(matches!(events.recv().unwrap(), LazyEvent::Complete(_)));
    assert_eq!(guest.given(), MEMORY * 3 / 4);
    assert!(guest.memory().resident().unwrap().len() * 4096 <= MEMORY / 4);
    reaches(&guest, MEMORY / 2);
    goes_on(&guest, 10_000);
}

#[test]
fn what_a_guest_gave_back_is_not_there_when_it_is_restored_lazily() {
    for tracker in [Tracker::UffdWriteProtect, Tracker::Software] {
        comes_back(&Process { workload: WHOLE.into(), ..process(tracker) });
    }
    if has_kvm() {
        comes_back(&Kvm { workload: WHOLE.into(), ..kvm_machine(DirtyLog::Auto) });
    }
}
