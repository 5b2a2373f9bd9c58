//! How long a guest stands still to be saved, and how long it takes from a bundle to a guest that runs.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ferry_bundle::{Chain, Pages};
use ferry_guest::status::{self, StatusView};
use ferry_migrate::{
    Guest, Host, LazyEvent, Paging, Restored, SaveCanceller, SaveOptions, SaveReport, restore,
    restore_lazily, save,
};
use ferry_pages::PAGE_BYTES;
use ferry_process_guest::{ProcessGuest, ProcessHost};
use ferry_refvmm::{Machine, RefHost};

use crate::figures::Figures;
use crate::moves::{kvm, process};
use crate::{Failure, GIB, Plan};

const PACED: &str = "pattern=working-set set=32M rate=10000 arena=512M fill=all fill_random=50";
const BUSY: &str = "pattern=working-set set=32M arena=512M fill=all fill_random=50";
/// What takes longer than this hangs.
const HANG: Duration = Duration::from_secs(60);

/// A guest that counts its steps.
trait Counts: Guest + Sized + 'static {
    fn steps(&self) -> Result<u64, Failure>;
    /// Steps that it had made when it was saved; `restored` does not run yet.
    fn steps_before(restored: &Self, bundle: &Chain) -> Result<u64, Failure>;
    fn stop(&mut self);
}

impl Counts for ProcessGuest {
    fn steps(&self) -> Result<u64, Failure> {
        Ok(self.counters().iter().map(|c| c.written + c.checked).sum())
    }
    fn steps_before(restored: &Self, _: &Chain) -> Result<u64, Failure> {
        restored.steps()
    }
    fn stop(&mut self) {
        Self::stop(self);
    }
}

const STATUS: u64 = status::GPA / PAGE_BYTES as u64;

fn total(page: &[u8]) -> Result<u64, Failure> {
    let total = StatusView::parse(page).map_err(|e| e.to_string())?.total();
    Ok(total.written + total.checked)
}

impl Counts for Machine {
    fn steps(&self) -> Result<u64, Failure> {
        let mut page = vec![0; status::BYTES];
        self.memory().read(STATUS, &mut page)?;
        total(&page)
    }
    fn steps_before(_: &Self, bundle: &Chain) -> Result<u64, Failure> {
        // Not from its memory: that page may not be there.
        total(Pages::new(bundle).page(STATUS)?.ok_or("the guest has no status page")?)
    }
    fn stop(&mut self) {
        Self::stop(self);
    }
}

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    println!(
        "\nSave and restore of a guest of 1 GiB with 512 MiB of data, files in the page cache, ms (goals: \
         stop 10, lazy restore 50)"
    );
    of(plan, "process guest", &ProcessHost::default(), |work| process(GIB, work))?;
    if plan.kvm {
        of(plan, "KVM guest", &RefHost::default(), |work| kvm(&plan.pki, GIB, work))?;
    }
    Ok(())
}

fn of<H: Host>(
    plan: &Plan,
    kind: &str,
    host: &H,
    make: impl Fn(&str) -> Result<H::Guest, Failure>,
) -> Result<(), Failure>
where
    H::Guest: Counts,
{
    let dir = tempfile::tempdir()?;
    let here = dir.path().join("bundle");
    for (what, workload) in
        [("writing 10,000 pages/s", PACED), ("rewriting 32 MiB as fast as it can", BUSY)]
    {
        let mut guest = make(workload)?;
        let mut reports = Vec::new();
        for _ in 0..plan.repeats {
            let options = SaveOptions { max_stop: HANG, ..SaveOptions::default() };
            let canceller = SaveCanceller::default();
            reports.push(save(&mut guest, &here, &options, &canceller, &mut |_| {})?);
        }
        guest.stop();
        let of = |value: fn(&SaveReport) -> f64| Figures::new(reports.iter().map(value));
        println!("  {:<56} {:.1}", format!("{kind}, {what}: stop"), of(|r| r.stop_ms));
        println!(
            "    whole save {:.0}, pages in the stop {:.0}, bundle {:.0} MiB",
            of(|r| r.total_ms),
            of(|r| r.pages_in_stop as f64),
            of(|r| (r.memory_bytes >> 20) as f64)
        );
    }
    let (mut eager, mut lazy, mut pagings) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.repeats {
        eager.push(runs(host, &here, false)?.0);
        let (took, paging) = runs(host, &here, true)?;
        lazy.push(took);
        pagings.extend(paging);
    }
    let figures = |values: &[Duration]| Figures::new(values.iter().map(|t| t.as_secs_f64() * 1e3));
    for (what, took) in [("eager", &eager), ("lazy", &lazy)] {
        let what = format!("{kind}, {what} restore: until guest code has run");
        println!("  {what:<56} {:.1}", figures(took));
    }
    let of = |value: fn(&Paging) -> f64| Figures::new(pagings.iter().map(value));
    println!(
        "    all pages here after {:.0}; {:.0} came untouched, {:.0} were waited for: {:.2} median, {:.2} p99, {:.2} longest",
        of(|p| p.took_ms),
        of(|p| p.pushed as f64),
        of(|p| p.requested as f64),
        of(|p| p.wait_ms.p50),
        of(|p| p.wait_ms.p99),
        of(|p| p.wait_ms.max)
    );
    Ok(())
}

/// From the call until guest code has run; of a lazy restore, how its pages came.
fn runs<H: Host>(host: &H, dir: &Path, lazily: bool) -> Result<(Duration, Option<Paging>), Failure>
where
    H::Guest: Counts,
{
    let known = Chain::open(dir, &[])?;
    let (sender, events) = channel();
    let began = Instant::now();
    let bundle = Arc::new(Chain::open(dir, &[])?);
    let Restored { mut guest, permit, .. } = if lazily {
        restore_lazily(host, bundle, "bench", move |event| drop(sender.send(event)))?.0
    } else {
        restore(host, &bundle, "bench", &mut |_| {})?
    };
    let before = H::Guest::steps_before(&guest, &known)?;
    guest.resume(permit).map_err(|(_permit, e)| e)?;
    while guest.steps()? == before {
        if began.elapsed() > HANG {
            return Err("the restored guest does not go on".into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let took = began.elapsed();
    let paging = if lazily {
        match events.recv_timeout(HANG)? {
            LazyEvent::Complete(paging) => Some(paging),
            LazyEvent::Damaged(why) => return Err(why.into()),
        }
    } else {
        None
    };
    guest.stop();
    Ok((took, paging))
}
