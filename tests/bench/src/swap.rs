//! How long a page takes to come back from the swap pool, beside the bare round trip of a userfault; and how fast pages
//! are moved out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ferry_memory::{GuestView, Mapping, MissingPages, Touch, resident};
use ferry_pages::{PAGE_BYTES, PageSet};
use ferry_swap::{Options, Swap};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::figures::Figures;
use crate::{Failure, MIB, Plan};

const PAGES: u64 = 32 * MIB / PAGE_BYTES as u64;
const GOAL: f64 = 3.0;

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    let cases = [("a quarter random", 25), ("three quarters random", 75), ("all random", 100)];
    let (mut bare, mut swapped) = (Vec::new(), cases.map(|_| Vec::new()));
    let (mut ratios, mut out) = (cases.map(|_| Vec::new()), cases.map(|_| Vec::new()));
    for turn in 0..=plan.repeats {
        let round_trip = bare_round_trip()?;
        if turn > 0 {
            bare.push(round_trip);
        }
        for (case, (_, percent)) in cases.iter().enumerate() {
            let (wait, rate) = swap_in(*percent)?;
            if turn > 0 {
                swapped[case].push(wait);
                ratios[case].push(wait / round_trip);
                out[case].push(rate);
            }
        }
    }
    println!(
        "\nA page of the swap pool is touched: median wait, beside the bare round trip of a userfault"
    );
    println!("  {:<24} {:.1} us", "bare round trip", Figures::new(bare));
    for (case, (what, _)) in cases.iter().enumerate() {
        let figures = Figures::new(ratios[case].iter().copied());
        let verdict = if figures.median() <= GOAL { "met" } else { "MISSED" };
        println!(
            "  {what:<24} {:.1} us, times the bare one: {figures:.2} (goal: at most {GOAL:.0}: {verdict}); moved \
             out at {:.0} MiB/s",
            Figures::new(swapped[case].iter().copied()),
            Figures::new(out[case].iter().copied())
        );
    }
    Ok(())
}

fn shuffled() -> Vec<u64> {
    let mut pages: Vec<u64> = (0..PAGES).collect();
    pages.shuffle(&mut rand::rng());
    pages
}

/// The median time of a touch, us.
fn touch_all(view: &GuestView) -> Result<f64, Failure> {
    let mut waits = Vec::new();
    let mut word = [0; 8];
    for gfn in shuffled() {
        let began = Instant::now();
        view.read(gfn, &mut word)?;
        waits.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Figures::new(waits).median())
}

/// A thread that waits for touches as the swap's does, and gives each the same page.
fn bare_round_trip() -> Result<f64, Failure> {
    let view = GuestView::of(vec![(0, Mapping::anonymous(PAGES)?)])?;
    let missing = MissingPages::watch_for_swap(view.clone())?;
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            ferry_pager::hurry();
            let (page, mut touches) = ([1; PAGE_BYTES], Vec::new());
            while !end.load(Ordering::Relaxed) {
                let fd = missing.fd();
                let soon = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&soon));
                touches.clear();
                let _ = missing.read(&mut touches);
                for touch in &touches {
                    if let Touch::Fault { gfn, .. } = touch {
                        let _ = missing.place(*gfn, &page);
                    }
                }
            }
        });
        let wait = touch_all(&view);
        end.store(true, Ordering::Relaxed);
        wait
    })
}

/// The median time of a touch, us, and how fast pages were moved out before, MiB/s.
fn swap_in(percent: usize) -> Result<(f64, f64), Failure> {
    let view = GuestView::of(vec![(0, Mapping::anonymous(PAGES)?)])?;
    let mut rng = rand::rng();
    let mut page = vec![0; PAGE_BYTES];
    for gfn in 0..PAGES {
        page.fill(rng.random());
        rng.fill_bytes(&mut page[..PAGE_BYTES * percent / 100]);
        view.write(gfn, &page)?;
    }
    let swap = Swap::new(&view, &Options { pool_bytes: 64 * MIB, dir: None, file_bytes: 0 })?;
    let began = Instant::now();
    swap.set_limit(Some(0))?;
    while swap.figures().swapped_bytes < PAGES * PAGE_BYTES as u64 {
        if began.elapsed() > Duration::from_secs(60) {
            return Err(format!("pages are not moved out: {:?}", swap.figures()).into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let rate = (PAGES * PAGE_BYTES as u64 / MIB) as f64 / began.elapsed().as_secs_f64();
    swap.set_limit(None)?;
    let wait = touch_all(&view.plain())?;
    let here: PageSet = resident(view.regions())?;
    if here.len() < PAGES {
        return Err(format!("not all came back: {:?}", swap.figures()).into());
    }
    Ok((wait, rate))
}
