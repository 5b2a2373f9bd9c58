//! vCPU threads: run, park, end.
//!
//! ```text
//!             order = Run                     KVM_RUN returns EINTR
//!   parked ───────────────▶ in KVM_RUN ──────────────────────────────▶ parked
//!                             │   ▲  port, memory, ring full              ▲
//!                             └───┘                                       │ (and every other vCPU)
//!                             triple fault, reset, emulation failure ─────┘ ended
//! ```
//!
//! Only who gives orders writes a vCPU's `immediate_exit`: 1 before the signal of a stop, 0 before a
//! start. So a signal that comes just before `KVM_RUN` is not lost, and a vCPU that still owes KVM the result
//! of a port or memory access enters once more to complete it, without executing, before it parks: what is
//! saved is consistent.
#![expect(unsafe_code, reason = "signals to threads, and fields of the shared kvm_run page")]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_dirtylog::KvmRings;
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_INTERNAL_ERROR_EMULATION};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::VmmError;
use crate::balloon::BalloonDevice;
use crate::console::Console;
use crate::ports::{self, Asks};

const STOP_LIMIT: Duration = Duration::from_secs(5);
/// vCPUs that are held back are stopped after so long, to wait in proportion.
const TURN: Duration = Duration::from_millis(1);
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It reset the machine.
    Reset(String),
    /// It cannot go on.
    Crashed(String),
}

/// What the threads are to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Park,
    Run,
    Exit,
}

struct Gate {
    order: Order,
    /// vCPUs inside the run loop.
    running: usize,
    ended: Option<Ended>,
}

/// One vCPU; whoever holds `fd` may use it, and it is free whenever the vCPU is parked.
struct Vcpu {
    fd: Mutex<VcpuFd>,
    immediate_exit: ImmediateExit,
    thread: OnceLock<libc::pthread_t>,
}

/// The flag in a vCPU's `kvm_run` page.
struct ImmediateExit(*const AtomicU8);

// SAFETY: it points to an atomic in a mapping that is not tied to a thread.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(std::ptr::from_mut(&mut fd.get_kvm_run().immediate_exit).cast())
    }

    fn set(&self, on: bool) {
        // SAFETY: the mapping lives as long as the `VcpuFd` beside us in `Vcpu`.
        unsafe { (*self.0).store(u8::from(on), Ordering::SeqCst) }
    }

    fn is_set(&self) -> bool {
        // SAFETY: as in `set`.
        unsafe { (*self.0).load(Ordering::SeqCst) == 1 }
    }
}

/// What answers vCPUs outside of KVM.
pub(crate) struct Devices {
    pub(crate) console: Arc<Console>,
    pub(crate) balloon: Arc<BalloonDevice>,
}

/// All vCPUs of a machine, with what their exits need.
pub(crate) struct Vcpus {
    vcpus: Vec<Vcpu>,
    gate: Mutex<Gate>,
    changed: Condvar,
    devices: Devices,
    rings: Option<Arc<KvmRings>>,
    /// Percent of their time that vCPUs are held back.
    throttle: AtomicU8,
}

/// Why a vCPU left its loop.
enum Left {
    Stopped,
    Ended(Ended),
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Takes over the vCPUs and parks a thread for each.
    pub(crate) fn start(
        fds: Vec<VcpuFd>,
        devices: Devices,
        rings: Option<Arc<KvmRings>>,
        name: &str,
    ) -> Result<(Arc<Self>, Vec<JoinHandle<()>>), VmmError> {
        let thread_error = |index, source| VmmError::Thread { index, source };
        register_signal_handler(SIGRTMIN(), on_kick)
            .map_err(|e| thread_error(0, std::io::Error::from_raw_os_error(e.errno())))?;
        let vcpus = fds
            .into_iter()
            .map(|mut fd| {
                let immediate_exit = ImmediateExit::of(&mut fd);
                immediate_exit.set(true);
                Vcpu { fd: Mutex::new(fd), immediate_exit, thread: OnceLock::new() }
            })
            .collect();
        let gate = Mutex::new(Gate { order: Order::Park, running: 0, ended: None });
        let all = Arc::new(Self {
            vcpus,
            gate,
            changed: Condvar::new(),
            devices,
            rings,
            throttle: AtomicU8::new(0),
        });
        let mut threads = Vec::new();
        for index in 0..all.vcpus.len() {
            let number = u32::try_from(index).unwrap_or(u32::MAX);
            let mine = Arc::clone(&all);
            match std::thread::Builder::new()
                .name(format!("{}-vcpu{index}", name.chars().take(6).collect::<String>()))
                .spawn(move || mine.thread(index))
            {
                Ok(thread) => {
                    let _ = all.vcpus[index].thread.set(thread.as_pthread_t());
                    threads.push(thread);
                }
                Err(e) => {
                    all.exit();
                    threads.into_iter().for_each(|t| drop(t.join()));
                    return Err(thread_error(number, e));
                }
            }
        }
        Ok((all, threads))
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vCPUs there are.
    pub(crate) fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// How the guest ended, if it did.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.gate().ended.clone()
    }

    /// Waits until the guest ended, or `timeout` passed.
    pub(crate) fn wait_ended(&self, timeout: Duration) -> Option<Ended> {
        let (gate, _) = self
            .changed
            .wait_timeout_while(self.gate(), timeout, |g| {
                g.ended.is_none() && g.order != Order::Exit
            })
            .unwrap_or_else(PoisonError::into_inner);
        gate.ended.clone()
    }

    /// Lets every vCPU run, unless the guest ended.
    pub(crate) fn run(&self) {
        let mut gate = self.gate();
        if gate.ended.is_none() && gate.order != Order::Exit {
            self.vcpus.iter().for_each(|v| v.immediate_exit.set(false));
            gate.order = Order::Run;
            self.changed.notify_all();
        }
    }

    /// Stops every vCPU; returns when none executes guest code.
    pub(crate) fn park(&self, name: &str) -> Result<(), VmmError> {
        self.halt_as(Order::Park, name)
    }

    /// Ends every thread.
    pub(crate) fn exit(&self) {
        // A vCPU that is stuck in the kernel ends when its fault is served; the join waits for that.
        let _ = self.halt_as(Order::Exit, "");
    }

    fn halt_as(&self, order: Order, name: &str) -> Result<(), VmmError> {
        let begun = Instant::now();
        let mut gate = self.gate();
        if gate.order != Order::Exit {
            gate.order = order;
        }
        self.changed.notify_all();
        self.kick();
        while gate.running > 0 {
            gate = self
                .changed
                .wait_timeout(gate, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if gate.running > 0 {
                if begun.elapsed() > STOP_LIMIT {
                    let running = gate.running;
                    let waited_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    return Err(VmmError::DoesNotStop {
                        name: name.to_owned(),
                        running,
                        waited_ms,
                    });
                }
                self.kick();
            }
        }
        Ok(())
    }

    /// Holds every vCPU back for `percent` of its time.
    ///
    /// # Errors
    /// No thread for it.
    pub(crate) fn throttle(self: &Arc<Self>, percent: u8) -> std::io::Result<()> {
        let before = self.throttle.swap(percent.min(99), Ordering::Relaxed);
        if before > 0 || percent == 0 {
            return Ok(());
        }
        let all = Arc::downgrade(self);
        let thread = std::thread::Builder::new().name("ferry-throttle".into());
        // Ends when vCPUs are let go, or are gone.
        let run = move || {
            while let Some(all) = all.upgrade().filter(|a| a.throttle.load(Ordering::Relaxed) > 0) {
                // No thread ends while the gate is held.
                let gate = all.gate();
                if gate.order == Order::Run {
                    all.signal();
                }
                drop(gate);
                drop(all);
                std::thread::sleep(TURN);
            }
        };
        let begun = thread.spawn(run).map(drop);
        if begun.is_err() {
            self.throttle.store(0, Ordering::Relaxed);
        }
        begun
    }

    /// Makes up for the time that the vCPU of this thread ran since `turn`, or waits until there is another order.
    fn hold_back(&self, turn: &mut Duration) {
        let percent = u32::from(self.throttle.load(Ordering::Relaxed));
        let now = cpu_time();
        let ran = now.saturating_sub(std::mem::replace(turn, now));
        if percent > 0 {
            // It may not have been held back before, and run for long.
            let held = ran.min(4 * TURN) * percent / (100 - percent);
            let waits = |gate: &mut Gate| gate.order == Order::Run;
            let _ = self.changed.wait_timeout_while(self.gate(), held, waits);
        }
    }

    /// Makes every vCPU leave the guest for good.
    fn kick(&self) {
        self.vcpus.iter().for_each(|v| v.immediate_exit.set(true));
        self.signal();
    }

    /// Makes every vCPU leave the guest.
    fn signal(&self) {
        for v in &self.vcpus {
            if let Some(thread) = v.thread.get() {
                // SAFETY: threads are joined only after they were told to exit by `Machine`, which does
                // not kick afterwards; until then the handle is valid.
                unsafe { libc::pthread_kill(*thread, SIGRTMIN()) };
            }
        }
    }

    /// Uses vCPU `index`, which is parked.
    pub(crate) fn with<T>(&self, index: usize, act: impl FnOnce(&mut VcpuFd) -> T) -> T {
        act(&mut self.vcpus[index].fd.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn thread(&self, index: usize) {
        loop {
            let mut gate = self
                .changed
                .wait_while(self.gate(), |g| g.order == Order::Park)
                .unwrap_or_else(PoisonError::into_inner);
            if gate.order == Order::Exit {
                return;
            }
            gate.running += 1;
            drop(gate);
            let left = self.with(index, |fd| self.run_vcpu(index, fd));
            let mut gate = self.gate();
            gate.running -= 1;
            if let Left::Ended(how) = left {
                gate.ended.get_or_insert(how);
                if gate.order == Order::Run {
                    gate.order = Order::Park;
                }
                self.kick();
            }
            self.changed.notify_all();
        }
    }

    fn run_vcpu(&self, index: usize, fd: &mut VcpuFd) -> Left {
        let crashed = |why: String| Left::Ended(Ended::Crashed(format!("vCPU {index}: {why}")));
        let mut turn = cpu_time();
        loop {
            match fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    ports::read_port(&self.devices.console, port, data);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    if let Asks::Reset(by) = ports::write_port(&self.devices.console, port, data) {
                        return Left::Ended(Ended::Reset(format!(
                            "vCPU {index} reset the machine ({by})"
                        )));
                    }
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    if !self.devices.balloon.read(address, data) {
                        data.fill(0xff);
                    }
                }
                Ok(VcpuExit::MmioWrite(address, data)) => self.devices.balloon.write(address, data),
                Ok(VcpuExit::Intr) => self.hold_back(&mut turn),
                Ok(VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    if let Some(Err(e)) = self.rings.as_ref().map(|r| r.on_full(fd)) {
                        return crashed(e.to_string());
                    }
                }
                Ok(VcpuExit::Shutdown) => return crashed(format!("triple fault{}", place(fd))),
                Ok(VcpuExit::InternalError) => return crashed(internal_error(fd)),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return crashed(format!(
                        "the processor refused to enter the guest: reason {reason:#x}, CPU {cpu}"
                    ));
                }
                Ok(other) => {
                    let what = format!("{other:?}");
                    return crashed(format!("unexpected exit {what}{}", place(fd)));
                }
                Err(e) => match e.errno() {
                    libc::EINTR if self.vcpus[index].immediate_exit.is_set() => {
                        return Left::Stopped;
                    }
                    libc::EINTR => self.hold_back(&mut turn),
                    libc::EAGAIN => {}
                    _ => return crashed(format!("KVM_RUN: {e}{}", place(fd))),
                },
            }
        }
    }
}

/// What this thread has had of a CPU, the guest included.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists, and the pointer is to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Where the vCPU stands.
fn place(fd: &VcpuFd) -> String {
    fd.get_regs().map(|r| format!(" at rip {:#x}", r.rip)).unwrap_or_default()
}

/// What KVM says about an internal error.
fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason says that this is the member of the union that is filled; all of its fields
    // are plain integers.
    let (suberror, ndata, data) = unsafe {
        let i = fd.get_kvm_run().__bindgen_anon_1.internal;
        (i.suberror, i.ndata, i.data)
    };
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
        _ => "KVM internal error",
    };
    let mut said = format!("{what} (suberror {suberror}){}", place(fd));
    // data[0]: flags, bit 0 says that data[1] holds a length byte, then up to 15 instruction bytes.
    if suberror == KVM_INTERNAL_ERROR_EMULATION && ndata >= 3 && data[0] & 1 == 1 {
        let bytes: Vec<u8> = data[1..3].iter().flat_map(|w| w.to_le_bytes()).collect();
        let count = usize::from(bytes[0]).min(15);
        let hex: Vec<String> = bytes[1..=count].iter().map(|b| format!("{b:02x}")).collect();
        said.push_str(&format!(", instruction bytes {}", hex.join(" ")));
    }
    said
}
