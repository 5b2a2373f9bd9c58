//! The right to run a machine: one exists for each machine, wherever it is.

use serde::{Deserialize, Serialize};

/// The right to run one machine.
///
/// Not `Clone`: resuming consumes it, and sending it to the destination moves it away. A machine's
/// permit is made once, by [`RunPermit::for_new_machine`]; after that it only moves.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunPermit {
    machine: u128,
    handovers: u64,
}

impl RunPermit {
    /// The permit of a machine that has never run; `machine` is a random number that names it for ever.
    pub fn for_new_machine(machine: u128) -> Self {
        Self { machine, handovers: 0 }
    }

    /// The machine's lasting number.
    pub fn machine(&self) -> u128 {
        self.machine
    }

    /// How many times the machine was handed over.
    pub fn handovers(&self) -> u64 {
        self.handovers
    }

    /// Splits into the permit that goes to the destination and the stub that stays.
    pub(crate) fn hand_over(self) -> (Self, PermitStub) {
        let stub = PermitStub { machine: self.machine, handovers: self.handovers };
        (Self { machine: self.machine, handovers: self.handovers + 1 }, stub)
    }
}

/// What stays at the source when a permit was sent: no right to run, but the way back to one if the
/// destination proves that it never used its own.
#[derive(Debug, PartialEq, Eq)]
pub struct PermitStub {
    machine: u128,
    handovers: u64,
}

impl PermitStub {
    /// The permit again: the destination said that it never ran the machine and never will.
    pub(crate) fn refused_by_destination(self) -> RunPermit {
        RunPermit { machine: self.machine, handovers: self.handovers + 1 }
    }

    /// The permit again, on the word of an operator who made sure that the destination does not run
    /// the machine (powered off, fenced). Wrong, and the machine runs twice.
    pub fn fenced_by_operator(self) -> RunPermit {
        RunPermit { machine: self.machine, handovers: self.handovers + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_from_host_to_host_and_back_counts_as_a_hand_over() {
        let of = |permit: &RunPermit| (permit.machine(), permit.handovers());
        let (there, stub) = RunPermit::for_new_machine(7).hand_over();
        assert_eq!(of(&there), (7, 1));
        let (_, fenced) = there.hand_over();
        assert_eq!(of(&fenced.fenced_by_operator()), (7, 2));
        let here = stub.refused_by_destination();
        assert_eq!(of(&here), (7, 1), "the permit that left was never used");
        assert_eq!(of(&here.hand_over().0), (7, 2));
    }
}
