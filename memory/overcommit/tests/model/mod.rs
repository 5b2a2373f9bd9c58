//! A small model of machines in virtual time: balloons that follow at a finite rate, working sets that move, swap
//! that keeps what it is told, and pages that come back from it when they are touched.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ferry_overcommit::{Host, HostSeen, Machine, Manager, Observed, PAGE_BYTES, Pressure, Step};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// A guest: what it does, and where its memory is.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Memory that it touches once, and keeps.
    pub(crate) touches: u64,
    /// Part of it that it uses in every step.
    pub(crate) works_on: u64,
    pub(crate) grows_per_step: u64,
    pub(crate) balloon_per_step: u64,
    pub(crate) balloon_answers: bool,
    /// What can be swapped out to come down to a lower bound; nobody grows above a bound meanwhile.
    pub(crate) swap_per_step: u64,
    /// Swapped pages take one part in so many (2 or more) in the pool, or they go to the file; 0: all do.
    pub(crate) compresses: u64,
    /// The last word on its balloon, and how much it may hold.
    told: (u64, u64),
    size: u64,
    /// No more than this is in the pool.
    most_pool: u64,
    resident: u64,
    swapped: u64,
    ballooned: u64,
    came_back: VecDeque<u64>,
    went_out: u64,
}

impl Guest {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            touches: 0,
            works_on: 0,
            grows_per_step: GIB,
            balloon_per_step: 256 * MIB,
            balloon_answers: true,
            swap_per_step: 512 * MIB,
            compresses: 3,
            told: (0, 0),
            size,
            most_pool: 256 * MIB,
            resident: 0,
            swapped: 0,
            ballooned: 0,
            came_back: VecDeque::new(),
            went_out: 0,
        }
    }

    fn pool(&self) -> u64 {
        self.swapped.checked_div(self.compresses).unwrap_or(0).min(self.most_pool)
    }

    fn held(&self) -> u64 {
        self.resident + self.pool()
    }

    fn observed(&self) -> Observed {
        Observed {
            resident_bytes: self.resident,
            ballooned_bytes: self.ballooned,
            swapped_bytes: self.swapped,
            pool_bytes: self.pool(),
            saved_bytes: 0,
            active_bytes: Some(self.works_on.min(self.resident)),
            swap_in_bytes_per_s: self.came_back.back().copied().unwrap_or(0),
            balloon_answers: self.balloon_answers,
        }
    }

    /// Swaps until no more is held than allowed.
    fn swap_down_to(&mut self, at_most: u64) {
        self.most_pool = self.most_pool.min(at_most / 2);
        while self.held() > at_most && self.resident > 0 {
            let over = self.held() - at_most;
            let out = over.next_multiple_of(PAGE_BYTES).min(self.resident);
            self.resident -= out;
            self.swapped += out;
            self.went_out += out;
        }
    }

    /// A second of its life.
    fn live(&mut self, balloon: u64, at_most: u64) {
        if balloon > self.ballooned {
            let inflates = (balloon - self.ballooned).min(self.balloon_per_step);
            self.ballooned += inflates;
            // What is free goes first, then what the guest can best do without: that is swapped, if anything is.
            let too_much =
                (self.resident + self.swapped).saturating_sub(self.size - self.ballooned);
            let of_swapped = too_much.min(self.swapped);
            self.swapped -= of_swapped;
            self.resident -= too_much - of_swapped;
        } else {
            self.ballooned -= (self.ballooned - balloon).min(self.balloon_per_step);
        }
        let at_most = at_most.max(self.held().saturating_sub(self.swap_per_step));
        self.swap_down_to(at_most);
        let room = self.size - self.ballooned;
        let wants = self.touches.min(room);
        let grows = wants.saturating_sub(self.resident + self.swapped).min(self.grows_per_step);
        self.resident += grows;
        self.swap_down_to(at_most);
        // What it works on and is swapped comes back, and pushes out what it does not work on.
        let back = self.works_on.min(room).saturating_sub(self.resident).min(self.swapped);
        let back = back.min(512 * MIB) / PAGE_BYTES * PAGE_BYTES;
        self.resident += back;
        self.swapped -= back;
        self.swap_down_to(at_most);
        self.came_back.push_back(back);
    }
}

/// A host, its machines and its policy.
pub(crate) struct Model {
    manager: Manager,
    machines: Vec<(Machine, Guest)>,
    now: Duration,
    /// What others than machines take of the budget.
    pub(crate) others: u64,
    /// A machine that nobody sees.
    pub(crate) hide: Option<String>,
    pub(crate) last: Step,
}

impl Model {
    pub(crate) fn new(host: Host) -> Self {
        let mut manager = Manager::new(host);
        let last = manager.step(Duration::ZERO, &HostSeen::default(), &BTreeMap::new());
        Self { manager, machines: Vec::new(), now: Duration::ZERO, others: 0, hide: None, last }
    }

    pub(crate) fn try_start(&mut self, machine: Machine, guest: Guest) -> bool {
        let held = self.manager.admit(machine.clone()).is_ok();
        if held {
            self.machines.push((machine, guest));
        }
        held
    }

    pub(crate) fn start(&mut self, machine: Machine, guest: Guest) {
        assert!(self.try_start(machine, guest), "the host cannot hold it");
    }

    pub(crate) fn step(&mut self) -> Step {
        self.now += Duration::from_secs(1);
        let seen = HostSeen {
            used_bytes: self.held_in_all() + self.others,
            pressure: Pressure::default(),
        };
        let observed = (self.machines.iter())
            .filter(|(machine, _)| self.hide.as_ref() != Some(&machine.name))
            .map(|(machine, guest)| (machine.name.clone(), guest.observed()))
            .collect();
        self.last = self.manager.step(self.now, &seen, &observed);
        for ((machine, guest), target) in self.machines.iter_mut().zip(&self.last.targets) {
            // Who is not seen is not told either.
            if self.hide.as_ref() != Some(&machine.name) {
                let balloon =
                    if guest.balloon_answers { guest.size - target.guest_bytes } else { 0 };
                guest.told = (balloon, target.at_most_bytes);
            }
            guest.live(guest.told.0, guest.told.1);
        }
        self.last.clone()
    }

    fn index(&self, name: &str) -> usize {
        self.machines.iter().position(|(machine, _)| machine.name == name).expect("it runs")
    }

    pub(crate) fn count(&self) -> usize {
        self.machines.len()
    }

    pub(crate) fn guest(&mut self, name: &str) -> &mut Guest {
        let i = self.index(name);
        &mut self.machines[i].1
    }

    pub(crate) fn machine(&self, name: &str) -> &Machine {
        &self.machines[self.index(name)].0
    }

    pub(crate) fn held(&self, name: &str) -> u64 {
        self.machines[self.index(name)].1.held()
    }

    pub(crate) fn held_in_all(&self) -> u64 {
        self.machines.iter().map(|(_, guest)| guest.held()).sum()
    }

    pub(crate) fn swapped_out_ever(&self) -> u64 {
        self.machines.iter().map(|(_, guest)| guest.went_out).sum()
    }

    pub(crate) fn ballooned_in_all(&self) -> u64 {
        self.machines.iter().map(|(_, guest)| guest.ballooned).sum()
    }

    /// Bytes that came back in the last so many steps, of each machine.
    pub(crate) fn swapped_in_last(&self, steps: usize) -> Vec<u64> {
        let of = |guest: &Guest| guest.came_back.iter().rev().take(steps).sum();
        self.machines.iter().map(|(_, guest)| of(guest)).collect()
    }
}
