//! The bare-metal test guest: sets the machine up, then runs the workload on every vCPU in ring 3.
//!
//! Ring 0 is `boot.s` and nothing else. All of this runs in ring 3, where the page tables, the
//! interrupt table and the local APIC are within reach as memory.

#![no_std]
#![no_main]
#![allow(dead_code, unused_imports, reason = "the host's side uses the rest of the shared modules")]

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

#[path = "../src/status.rs"]
mod status;
#[path = "../src/workload/mod.rs"]
mod workload;

mod balloon;
mod builtins;
mod console;
mod machine;
mod memory;
mod record;
mod virtio;

use balloon::Balloon;
use console::say;
use memory::Memory;
use record::Counted;
use status::State;
use workload::{Pace, Params, Pattern, Step, Worker};

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

/// What every vCPU needs to know. Written by vCPU 0 before the others start.
struct Setup {
    params: Params,
    memory: Memory,
    tsc_khz: u64,
}

static SETUP: machine::Once<Setup> = machine::Once::new();
static STARTED: AtomicU32 = AtomicU32::new(0);
static GO: AtomicBool = AtomicBool::new(false);
static RUNNING: AtomicU32 = AtomicU32::new(0);

/// Where ring 3 begins on each vCPU.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(cpu: u32, start_info: u64) -> ! {
    if cpu == 0 {
        record::begin();
        machine::set_up();
        match prepare(start_info) {
            Ok(setup) => start(SETUP.set(setup)),
            Err(why) => record::refuse(why),
        }
    } else {
        machine::set_up_timer();
        STARTED.fetch_add(1, SeqCst);
        while !GO.load(SeqCst) {
            core::hint::spin_loop();
        }
    }
    match SETUP.get() {
        Some(setup) => work(setup, cpu),
        None => record::refuse("a vCPU began to run before vCPU 0 was ready"),
    }
}

fn prepare(start_info: u64) -> Result<Setup, &'static str> {
    let boot = memory::Boot::read(start_info)?;
    let params = match Params::parse(boot.command_line()) {
        Ok(params) => params,
        Err(bad) => record::refuse(bad),
    };
    let memory = Memory::divide(&boot, &params)?;
    let tsc_khz = if params.tsc_khz > 0 { params.tsc_khz } else { machine::tsc_khz() };
    if params.rate > 0 && tsc_khz == 0 {
        return Err(
            "rate= needs the frequency of the time-stamp counter, and CPUID does not tell it: add tsc_khz=",
        );
    }
    Ok(Setup { params, memory, tsc_khz })
}

fn start(setup: &Setup) {
    record::set_up(setup);
    balloon::set_up(&setup.params, &setup.memory);
    say!("boot {} arena_pages={}", setup.params, setup.memory.pages());
    for cpu in 1..setup.params.cpus {
        machine::start_cpu(cpu);
        let begin = machine::tsc();
        while STARTED.load(SeqCst) < cpu {
            if machine::tsc().wrapping_sub(begin) > 20_000_000_000 {
                record::refuse(format_args!(
                    "vCPU {cpu} does not start: the machine has fewer than cpus={}",
                    setup.params.cpus
                ));
            }
            core::hint::spin_loop();
        }
    }
    if setup.params.fill {
        record::state(State::Booting, State::Filling);
    }
    GO.store(true, SeqCst);
}

fn work(setup: &Setup, cpu: u32) -> ! {
    let Setup { params, memory, tsc_khz } = setup;
    let mut worker = Worker::new(params, cpu, memory.pages());
    let pace_from_now = || Pace::new(params, tsc_khz.saturating_mul(1000), machine::tsc());
    let mut pace = pace_from_now();
    let mut running = false;
    // When the last visit began, if one was made in the last step.
    let mut visiting = None;
    let mut balloon = if cpu == 0 { Balloon::find(params, memory, *tsc_khz) } else { None };
    loop {
        if !running && !worker.filling(params) {
            running = true;
            pace = pace_from_now();
            if RUNNING.fetch_add(1, SeqCst) + 1 == params.cpus {
                let from = if params.fill { State::Filling } else { State::Booting };
                record::state(from, State::Running);
                say!("running vcpus={}", params.cpus);
            }
        }
        if record::stopped() {
            machine::stop();
        }
        if !balloon::keep_to_limit(cpu, &mut worker, memory) {
            continue;
        }
        let now = machine::tsc();
        if let Some(began) = visiting {
            record::visit(now.saturating_sub(began));
        }
        let hurry = balloon.as_mut().is_some_and(|balloon| balloon.step(now));
        let step = worker.step(params, memory, &mut pace, now);
        record::count(
            cpu,
            Counted {
                written: worker.written,
                checked: worker.checked,
                tsc: now,
                filled: running.into(),
            },
        );
        visiting = matches!(step, Ok(Step::Wrote(_) | Step::Checked)).then_some(now);
        match step {
            Ok(Step::Wrote(_) | Step::Checked) => {}
            Ok(Step::Wait) if hurry => {}
            Ok(Step::Wait) if params.pattern == Pattern::Idle => machine::sleep_ms(10),
            Ok(Step::Wait) => machine::sleep_ms(1),
            Err(mismatch) => record::corrupt(cpu, memory, mismatch),
        }
    }
}

/// Where exceptions end.
#[unsafe(no_mangle)]
extern "C" fn fault_main(vector: u64, error: u64, rip: u64, address: u64) -> ! {
    record::fault(format_args!(
        "exception {vector} error={error:#x} rip={rip:#x} address={address:#x}"
    ))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    record::fault(format_args!("panic: {info}"))
}
