//! A guest whose memory is shared, of which a thread reads some pages without end, and writes none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ferry_dirtylog::{DirtySource, UffdWriteProtect};
use ferry_memory::{GuestView, Mapping};
use ferry_migrate::{Guest, GuestError};
use ferry_pages::{PAGE_BYTES, Run};
use ferry_process_guest::ProcessGuest;

/// A [`ProcessGuest`] that stands still, and memory instead of its own.
pub struct SharedMemory {
    guest: ProcessGuest,
    view: GuestView,
    ending: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl SharedMemory {
    /// All of its memory holds data; `read` is read.
    #[allow(unsafe_code, reason = "a view of a mapping")]
    pub fn new(mut guest: ProcessGuest, read: Run) -> Self {
        guest.pause_by_operator().unwrap();
        let pages = guest.memory().regions().iter().map(|region| region.run.pages).sum();
        let mapping = Mapping::memfd("test", pages).unwrap();
        let region = mapping.region(0, 0);
        // SAFETY: the view keeps the mapping, of which nobody else knows.
        let view = unsafe { GuestView::new(vec![region]) }.unwrap().keeping(mapping);
        for gfn in 0..pages {
            view.write(gfn, &[7; PAGE_BYTES]).unwrap();
        }
        let ending = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (view, ending) = (view.clone(), ending.clone());
            move || {
                let mut page = vec![0; PAGE_BYTES];
                while !ending.load(Ordering::Relaxed) {
                    for gfn in read.start..read.end() {
                        view.read(gfn, &mut page).unwrap();
                    }
                }
            }
        });
        Self { guest, view, ending, reader: Some(reader) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Guest for SharedMemory {
    super::pass_on!(spec pause resume save load);

    fn memory(&self) -> GuestView {
        self.view.clone()
    }

    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        Ok(vec![Box::new(UffdWriteProtect::new(self.view.regions().to_vec()).unwrap())])
    }
}
