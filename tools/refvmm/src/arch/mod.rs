//! x86-64: what a guest sees of its processors and board.

pub(crate) mod cpu;
pub(crate) mod cpuid;
pub(crate) mod features;
pub(crate) mod mptable;
pub(crate) mod registers;
