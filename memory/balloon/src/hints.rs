//! Free page hints, asked for by a command id (virtio 1.2, section 5.5.6.6).
//!
//! ```text
//!   begin: id 7 ──▶ guest: 7 … pages … STOP ──▶ complete ──▶ end: DONE (the guest may use the pages again)
//! ```
//! The guest answers by the queue on which pages come, so that which id they are for is known from the order.

use ferry_pages::PageSet;

const STOP: u32 = 0;
const DONE: u32 = 1;
/// Ids begin here, as QEMU's do.
const FIRST_ID: u32 = 0x8000_0000;

/// Hints that are asked for, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    /// What the configuration shows.
    command: u32,
    /// The last id that was used.
    id: u32,
    /// Whether hints are asked for.
    asked: bool,
    /// The guest is sending hints for the id.
    sending: bool,
    /// The guest said that these were all.
    complete: bool,
    /// Not yet taken.
    pub(crate) pages: PageSet,
    /// How many pages since the beginning.
    pub(crate) count: u64,
}

impl Hints {
    /// After a restore: the one who asked is on another host.
    pub(crate) fn restored(id: u32, command: u32) -> Self {
        Self { id, command: if command == STOP { STOP } else { DONE }, ..Self::default() }
    }

    pub(crate) fn command(&self) -> u32 {
        self.command
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn begin(&mut self) {
        let id = self.id.wrapping_add(1).max(FIRST_ID);
        *self = Self { command: id, id, asked: true, ..Self::default() };
    }

    /// Whether that is something new to the guest.
    pub(crate) fn end(&mut self) -> bool {
        let asked = self.asked;
        if asked {
            *self = Self { command: DONE, id: self.id, count: self.count, ..Self::default() };
        }
        asked
    }

    pub(crate) fn is_over(&self) -> bool {
        !self.asked || self.complete
    }

    /// The driver begins to send hints for `id`, or stops.
    pub(crate) fn answer(&mut self, id: u32) -> Result<(), String> {
        match id {
            STOP => {
                // A STOP for an id before this one says nothing about this one.
                self.complete |= self.sending;
                self.sending = false;
            }
            id if self.asked && id == self.id && !self.complete => self.sending = true,
            id => {
                self.sending = false;
                // What was under way when hints ended is nobody's fault.
                if self.asked {
                    return Err(format!("hints for command {id:#x}, not for {:#x}", self.id));
                }
            }
        }
        Ok(())
    }

    /// Takes `pages`, which the guest hinted as free.
    pub(crate) fn add(&mut self, pages: &PageSet) -> Result<(), String> {
        if self.sending {
            let before = self.pages.len();
            self.pages.union_with(pages);
            self.count += self.pages.len() - before;
        } else if self.asked && !pages.is_empty() {
            return Err(format!("{} pages hinted for no command", pages.len()));
        }
        Ok(())
    }
}
