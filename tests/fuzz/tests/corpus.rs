//! Every file of the corpora is replayed: seeds, inputs that reach far, and findings of the past.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use ferry_fuzz::TARGETS;

fn corpus(target: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn no_input_of_the_corpora_breaks_a_rule() {
    for (name, target) in TARGETS {
        let files = corpus(name);
        assert!(!files.is_empty(), "no corpus for {name}");
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            let done = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
            assert!(done.is_ok(), "{name} breaks on {}", file.display());
        }
    }
}
