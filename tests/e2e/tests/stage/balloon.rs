//! Guests that give memory back, behind one trait.

use ferry_guest::status::{self, StatusView};
use ferry_migrate::Guest;
use ferry_process_guest::ProcessGuest;
use ferry_refvmm::Machine;

use super::Subject;

/// A guest with a balloon.
pub trait Ballooned: Subject {
    /// Sets how much memory it shall have.
    fn shall_have(&self, bytes: u64);
    /// The same, unless it is being handed over.
    fn may_have(&self, bytes: u64);
    /// Bytes that it gave back, as its host knows it.
    fn given(&self) -> u64;
    /// The same, as the guest knows it.
    fn says_given(&self) -> u64;
    /// What was wrong with its requests.
    fn trouble(&self) -> Option<String>;
}

impl Ballooned for ProcessGuest {
    fn shall_have(&self, bytes: u64) {
        self.set_balloon_target(bytes).unwrap();
    }
    fn may_have(&self, bytes: u64) {
        let _ = self.set_balloon_target(bytes);
    }
    fn given(&self) -> u64 {
        self.balloon_bytes()
    }
    fn says_given(&self) -> u64 {
        self.balloon_bytes()
    }
    fn trouble(&self) -> Option<String> {
        self.balloon_trouble()
    }
}

impl Ballooned for Machine {
    fn shall_have(&self, bytes: u64) {
        self.set_balloon_target(bytes).unwrap();
    }
    fn may_have(&self, bytes: u64) {
        let _ = self.set_balloon_target(bytes);
    }
    fn given(&self) -> u64 {
        self.balloon().ballooned_bytes
    }
    fn says_given(&self) -> u64 {
        let mut page = vec![0; status::BYTES];
        self.memory().read(status::GPA >> 12, &mut page).unwrap();
        StatusView::parse(&page).unwrap().ballooned_pages() * 4096
    }
    fn trouble(&self) -> Option<String> {
        self.balloon().last_trouble
    }
}
