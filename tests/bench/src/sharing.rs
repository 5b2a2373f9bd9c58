//! How fast equal pages are found, beside plain hashing and the kernel's own search, and how soon merged.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_sharing::{Between, Ksm, MergeError, Merger, Options, Scanner, Sharing, Tenant};
use rand::Rng;
use xxhash_rust::xxh3::xxh3_64;

use crate::figures::{Figures, thread_cpu_time};
use crate::{Failure, GIB, Plan};

const PAGES: u64 = GIB / PAGE_BYTES as u64;
const GOAL_PLAIN: f64 = 0.6;
const GOAL_KSMD: f64 = 50.0;
const GOAL_SOONER: f64 = 20.0;
/// The kernel's settings as it boots (Documentation/admin-guide/mm/ksm.rst).
const DEFAULTS: [(&str, &str); 3] =
    [("pages_to_scan", "100"), ("sleep_millisecs", "20"), ("smart_scan", "1")];
const SYSFS: &str = "/sys/kernel/mm/ksm";
/// For how long the kernel's own search is looked at.
const LOOK: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(120);
/// Passes until a page that nobody writes is read.
const PASSES: usize = 3;

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    println!("\nFinding and merging equal pages, 1 GiB of private memory, by CPU time of one core");
    let (mut plain, mut unlike, mut alike) = (vec![], vec![], vec![]);
    for equal in [false, true] {
        let (view, bytes) = filled(equal)?;
        for turn in 0..=plan.repeats {
            let (hashed, scanned) = (plain_rate(&bytes), scanner_rate(&view)?);
            if turn > 0 {
                plain.push(hashed);
                if equal { &mut alike } else { &mut unlike }.push((scanned, scanned / hashed));
            }
        }
    }
    println!("  plain xxh3 of each page: {:.2} GB/s", Figures::new(plain));
    for (what, pairs) in [("no equal pages", &unlike), ("each page twice", &alike)] {
        let rate = Figures::new(pairs.iter().map(|(rate, _)| *rate));
        let share = Figures::new(pairs.iter().map(|(_, share)| *share));
        let verdict = if share.median() >= GOAL_PLAIN { "met" } else { "MISSED" };
        println!(
            "  scanner, {what}: {rate:.2} GB/s, {share:.2} of that (goal: {GOAL_PLAIN}): {verdict}"
        );
    }
    let scanner = Figures::new(unlike.iter().map(|(rate, _)| *rate)).median();
    match merging(scanner) {
        // Not for us to set, or not there: said by the error.
        Err(e) if e.is::<MergeError>() => println!("  not compared with the kernel's thread: {e}"),
        ended => ended?,
    }
    Ok(())
}

/// How soon 1 GiB of pages that are all there twice is merged, once: a merge cannot be repeated.
fn merging(scanner: f64) -> Result<(), Failure> {
    let ksmd = ksmd_rate()?;
    let (view, _) = filled(true)?;
    let mut sharing = Sharing::new(view, Options::default())?;
    let began = Instant::now();
    for _ in 0..PASSES {
        sharing.pass(&PageSet::new())?;
    }
    let found = began.elapsed();
    let faster = scanner / ksmd;
    let verdict = if faster >= GOAL_KSMD { "met" } else { "MISSED" };
    println!("  the kernel's thread at its defaults: {:.1} MB/s, in {LOOK:?}", ksmd * 1e3);
    println!("    the scanner is {faster:.0} times as fast (goal: {GOAL_KSMD:.0}): {verdict}");
    let began = Instant::now();
    sharing.merge(PATIENCE, &|| false);
    let took = found + began.elapsed();
    let report = sharing.report();
    if report.read_back.merging_pages < PAGES {
        return Err(format!(
            "{} pages were merged of {PAGES}: {report}",
            report.read_back.merging_pages
        )
        .into());
    }
    // It notes a page's checksum at a first look, and merges it at a second.
    let default = 2.0 * GIB as f64 / 1e9 / ksmd;
    let sooner = default / took.as_secs_f64();
    let verdict = if sooner >= GOAL_SOONER { "met" } else { "MISSED" };
    println!(
        "  1 GiB found ({found:.1?}) and merged by a burst after {took:.1?}, {} bytes of profit",
        report.read_back.profit_bytes
    );
    println!(
        "    {sooner:.0} times sooner than at the defaults, two looks at all of it: {default:.0} s, extrapolated from \
         {LOOK:?} (goal: {GOAL_SOONER:.0}): {verdict}"
    );
    Ok(())
}

/// A machine of random pages, each of them twice if `equal`, and the same bytes in plain memory.
fn filled(equal: bool) -> Result<(GuestView, Vec<u8>), Failure> {
    let mut bytes = vec![0; usize::try_from(GIB)?];
    let (first, second) = bytes.split_at_mut(usize::try_from(GIB / 2)?);
    rand::rng().fill_bytes(first);
    if equal {
        second.copy_from_slice(first);
    } else {
        rand::rng().fill_bytes(second);
    }
    let view = GuestView::of(vec![(0, Mapping::anonymous(PAGES)?)])?;
    view.write(0, &bytes)?;
    Ok((view, bytes))
}

/// GB/s of one core.
fn plain_rate(bytes: &[u8]) -> f64 {
    let began = thread_cpu_time();
    let hashes = black_box(bytes).chunks(PAGE_BYTES).map(xxh3_64).fold(0, |all, hash| all ^ hash);
    black_box(hashes);
    rate(began)
}

/// GB/s of one core since it had worked for `began`, for all of the memory.
fn rate(began: Duration) -> f64 {
    GIB as f64 / 1e9 / (thread_cpu_time() - began).as_secs_f64()
}

/// GB/s of one core in the pass that reads everything, with its census.
fn scanner_rate(view: &GuestView) -> Result<f64, Failure> {
    let mut scanner = Scanner::new(Between::OneTenant, PASSES - 1)?;
    let machine = scanner.add(view.clone(), Tenant::default())?;
    for _ in 1..PASSES {
        scanner.pass(machine, &PageSet::new())?;
    }
    let began = thread_cpu_time();
    let last = scanner.pass(machine, &PageSet::new())?;
    let rate = rate(began);
    if last.scanned_pages != PAGES {
        return Err(format!("{} pages were scanned of {PAGES}", last.scanned_pages).into());
    }
    Ok(rate)
}

/// GB/s that the kernel's thread looks at as the host boots it, while something is advised.
fn ksmd_rate() -> Result<f64, Failure> {
    let (view, _) = filled(false)?;
    let mut merger = Merger::new(view, Ksm::default(), Tenant::default(), Between::OneTenant);
    merger.advise(&[Run::new(0, PAGES)].into_iter().collect())?;
    let file = |name: &str| Path::new(SYSFS).join(name);
    let scanned = || -> Result<f64, Failure> {
        Ok(fs::read_to_string(file("pages_scanned"))?.trim().parse::<f64>()?)
    };
    // Sets back what the settings were before.
    let burst = Ksm::default().burst(PATIENCE)?;
    let mut burst_settings = Vec::new();
    for (name, value) in DEFAULTS {
        burst_settings.push((name, fs::read_to_string(file(name))?));
        fs::write(file(name), value)?;
    }
    // What it had begun at full speed.
    thread::sleep(LOOK / 6);
    let (began, before) = (Instant::now(), scanned()?);
    thread::sleep(LOOK);
    let rate = (scanned()? - before) * PAGE_BYTES as f64 / 1e9 / began.elapsed().as_secs_f64();
    // What a burst finds changed it leaves alone.
    for (name, value) in burst_settings {
        fs::write(file(name), value.trim())?;
    }
    burst.end()?;
    Ok(rate)
}
