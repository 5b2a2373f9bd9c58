//! What a peer may take of a host, in one place; those of connections are in `ferry-transport`'s `gate`.

use std::time::Duration;

/// No hello is larger than this.
pub const MAX_HELLO_BYTES: usize = 256;
/// A peer that opened a channel says what it wants within this time, and a source what it offers.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Channels of one identity that have not said what they are for.
pub const MAX_UNKNOWN_PER_IDENTITY: usize = 128;
/// Machines that may be on their way in at once.
pub const MAX_ARRIVING: usize = 32;
/// Of them, machines that one identity sends.
pub const MAX_ARRIVING_PER_IDENTITY: usize = 24;
/// No migration has more lanes than this.
pub const MAX_LANES: u16 = 64;
/// No message of a source is larger than this, but for one: the commit may have the machine's state in it.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Messages of a source that may wait for the one before them.
pub const MAX_WAITING_MESSAGES: usize = 4;
/// A source that brings nothing and says nothing for this long before its machine runs here is not moving it.
pub const SILENCE: Duration = Duration::from_secs(300);
/// Loading a machine's state does not wait for longer than this for pages that the source owes.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// No machine that has not run is kept for longer without its source.
pub const MAX_KEEP: Duration = Duration::from_secs(3600);
/// Sessions whose end is remembered for inquiries.
pub const REMEMBERED: usize = 1024;

/// Characters of a peer's words that people are shown.
pub const MAX_WORDS: usize = 1000;
/// Reasons of a peer that people are shown.
pub const MAX_REASONS: usize = 32;

/// The most that a commit of a machine with `memory_bytes` may take: its list of owed pages and its state are less
/// than its memory, but for very small machines.
pub fn max_commit_bytes(memory_bytes: u64) -> usize {
    let memory = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
    memory.saturating_add(MAX_MESSAGE_BYTES).min(crate::wire::MAX_MESSAGE_BYTES)
}

/// The most that a message to the source of a machine with `memory_bytes` may take: what an old copy has comes in
/// parts of 2 MiB, and a list of pages has at most 8 bytes for each.
pub fn max_answer_bytes(memory_bytes: u64) -> usize {
    let list = usize::try_from(memory_bytes / 512).unwrap_or(usize::MAX);
    list.saturating_add(8 * MAX_MESSAGE_BYTES).min(crate::wire::MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use ferry_pages::{PageSet, Run};

    use super::*;
    use crate::PackedPages;

    #[test]
    fn what_a_machine_may_say_is_bounded_by_its_memory_and_holds_its_longest_lists() {
        assert_eq!(max_commit_bytes(0), MAX_MESSAGE_BYTES);
        assert_eq!(max_commit_bytes(1 << 20), (1 << 20) + MAX_MESSAGE_BYTES);
        for bytes in [1 << 40, u64::MAX] {
            assert_eq!(max_commit_bytes(bytes), crate::wire::MAX_MESSAGE_BYTES);
            assert_eq!(max_answer_bytes(bytes), crate::wire::MAX_MESSAGE_BYTES);
        }
        // Every other page of 1 GiB.
        let pages: PageSet = (0..1 << 17).map(|i| Run::new(2 * i, 1)).collect();
        let list = crate::wire::encode(&PackedPages::pack(&pages)).unwrap().len();
        for most in [max_answer_bytes(1 << 30), max_commit_bytes(1 << 30)] {
            assert!(list + 2 * MAX_MESSAGE_BYTES < most, "{list} bytes of {most}");
        }
        assert_eq!(max_answer_bytes(1 << 30), (2 << 20) + 8 * MAX_MESSAGE_BYTES);
    }
}
