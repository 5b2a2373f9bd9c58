//! Who holds how much of a host's memory when its machines have more than it has.
//!
//! [`Manager`] is told in each step what is seen of a [`Host`] and its [`Machine`]s, and says what each shall have
//! ([`Target`]) and by which [`Means`] it is taken: balloon, then merged pages, then swap. [`admit`] refuses
//! what could not be held if all guests touched all that they have. [`divide`] is the rule behind it: shares with
//! a tax on idle memory. A [`Plan`] is all of that for one host, read from a file, and an [`Outlook`] what becomes
//! of it.
//!
//! Pure: no clock, thread, socket or `unsafe`. It does not know how a balloon is asked, a page merged or swapped,
//! nor where figures come from.
//!
//! # A plan's file
//! ```toml
#![doc = include_str!("../example.toml")]
//! ```

mod activity;
mod admit;
mod divide;
mod level;
mod machine;
mod manager;
mod outlook;
mod plan;
mod size;
mod target;

pub use admit::{Held, Refusal, admit, hold, needs};
pub use divide::{Claim, divide};
pub use level::Level;
pub use machine::{BadMachine, Host, LARGEST_BYTES, Machine, Observed, PAGE_BYTES, Pressure, Tax};
pub use manager::{BALLOON_PATIENCE, HostSeen, Manager, SHARE_PATIENCE};
pub use outlook::{Outlook, Prospect};
pub use plan::{BadPlan, Plan, Swap};
pub use size::{NotASize, Size};
pub use target::{Means, Step, Target};
