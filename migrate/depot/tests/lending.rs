//! Bundles of another host are read as those of this one: whole, by the page, through lost links; and what
//! was replaced or damaged there is found.

#[path = "../../bundle/tests/model/mod.rs"]
mod model;
mod town;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferry_bundle::{Chain, Pages};
use ferry_depot::Network;
use model::{Memory, assert_chain_holds, file, page, read, save, some_memory};
use town::{Address, LONG, Lender, network, open, open_for, there};

/// `base`, and `next` that tells the difference to it.
fn chain_of_two(dir: &Path) -> Memory {
    let mut memory = some_memory();
    save(&dir.join("base"), &memory, None).unwrap();
    let base = model::open(&dir.join("base")).unwrap();
    memory.insert(9, page(5000, true));
    memory.remove(&30);
    save(&dir.join("next"), &memory, Some(&base)).unwrap();
    memory
}

/// More than is read ahead, and hard to compress.
fn large() -> Memory {
    (0..700).map(|gfn| (gfn, page(gfn + 7, true))).collect()
}

#[test]
fn a_chain_of_another_host_is_read_as_one_of_this_host() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    let memory = chain_of_two(dir.path());
    let lender = Lender::of(&address, dir.path());
    let here = model::open(&dir.path().join("next")).unwrap();
    let lent = open(&address, "next").unwrap();
    assert_eq!(lent.manifest(), here.manifest());
    assert_eq!(lent.record(), here.record());
    assert_eq!(lent.verify().unwrap(), here.verify().unwrap());
    assert!(read(&lent).unwrap() == read(&here).unwrap());
    assert_chain_holds(&lent, &memory);
    let mut pages = Pages::waited_for(lent);
    for (gfn, content) in &memory {
        assert!(pages.page(*gfn).unwrap() == Some(content.as_slice()), "page {gfn}");
    }
    assert_eq!(lender.read(), ["next"]);
    assert_eq!(lender.turned(), [""; 0]);
}

#[test]
fn a_bundle_may_be_what_is_lent_and_its_base_lie_anywhere() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    let memory = chain_of_two(dir.path());
    let _lender = Lender::of(&address, &dir.path().join("next"));
    let network = network(&address, LONG);
    for dir in ["", "/", "."] {
        // Its hint leads out of what is lent.
        let why = Chain::open_on(&network, &there(dir), &[]).unwrap_err().to_string();
        assert!(why.contains("needs its base") && why.contains("--base"), "{why}");
    }
    std::fs::rename(dir.path().join("base"), dir.path().join("next/base")).unwrap();
    let inside = there("base");
    for base in [inside, dir.path().join("next/base")] {
        let chain = Chain::open_on(&network, &there(""), &[base]).map(Arc::new);
        assert_chain_holds(&chain.unwrap(), &memory);
    }
}

#[test]
fn a_hint_of_another_host_never_leads_to_files_of_this_one() {
    use ferry_bundle::Shelf;
    let network = Network::new(|_| unreachable!(), LONG);
    let place = network.beside(&there("next"), "/etc/secret");
    assert!(Network::is_remote(&place), "{}", place.display());
    let place = network.beside(Path::new("/backup/next"), "../base");
    assert!(!Network::is_remote(&place), "{}", place.display());
}

#[test]
fn readers_go_on_when_the_depot_is_back() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    let memory = large();
    save(&dir.path().join("b"), &memory, None).unwrap();
    let lender = Lender::of(&address, dir.path());
    let chain = open(&address, "b").unwrap();
    let mut waited = Pages::waited_for(chain.clone());
    assert!(waited.page(3).unwrap() == Some(memory[&3].as_slice()));
    drop(lender);
    let reader = std::thread::spawn({
        let chain = chain.clone();
        move || chain.verify().unwrap()
    });
    let waiter = std::thread::spawn(move || waited.page(500).unwrap().map(<[u8]>::to_vec));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished() && !waiter.is_finished(), "nobody can answer");
    let _lender = Lender::of(&address, dir.path());
    assert!(waiter.join().unwrap().as_ref() == Some(&memory[&500]));
    assert_eq!(reader.join().unwrap().pages, 700);
}

#[test]
fn a_depot_that_stays_away_is_an_error_that_says_so_and_only_then() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    let memory = large();
    save(&dir.path().join("b"), &memory, None).unwrap();
    // Nobody was ever there: it is most likely the address that is wrong.
    let why = open(&address, "b").unwrap_err();
    assert!(!why.is_away() && why.to_string().contains("refuses connections"), "{why}");

    let lender = Lender::of(&address, dir.path());
    let chain = open_for(&address, "b", Duration::from_millis(500)).unwrap();
    let mut pages = Pages::waited_for(chain.clone());
    drop(lender);
    let why = pages.page(3).unwrap_err();
    assert!(why.is_away(), "{why}");
    for words in ["cannot read ferry://host1:7001/b/memory-", "refuses connections", "tried for"] {
        assert!(why.to_string().contains(words), "`{words}` is not in: {why}");
    }
    let _lender = Lender::of(&address, dir.path());
    assert!(pages.page(3).unwrap() == Some(memory[&3].as_slice()));
}

#[test]
fn a_bundle_that_is_replaced_stays_what_was_opened_while_the_link_holds_and_is_an_error_after_it() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    let (memory, here) = (large(), dir.path().join("b"));
    save(&here, &memory, None).unwrap();
    let lender = Lender::of(&address, dir.path());
    let chain = open(&address, "b").unwrap();
    let other: Memory = memory.keys().map(|gfn| (*gfn, page(gfn + 9000, true))).collect();
    save(&here, &other, None).unwrap();
    let mut pages = Pages::waited_for(chain.clone());
    assert!(pages.page(3).unwrap() == Some(memory[&3].as_slice()));
    assert!(read(&chain).unwrap().0 == memory);

    drop(lender);
    let _lender = Lender::of(&address, dir.path());
    for why in [pages.page(400).unwrap_err(), chain.verify().unwrap_err()] {
        let (why, away) = (why.to_string(), why.is_away());
        assert!(
            !away && why.contains("was replaced or removed") && why.contains("/b/mem"),
            "{why}"
        );
    }
    assert!(read(&open(&address, "b").unwrap()).unwrap().0 == other);
}

#[test]
fn a_flipped_byte_of_a_lent_file_is_found_by_the_reader_or_changes_nothing() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::default());
    chain_of_two(dir.path());
    let _lender = Lender::of(&address, dir.path());
    let right = read(&open(&address, "next").unwrap()).unwrap();
    for (bundle, kind) in
        [("next", "manifest"), ("next", "state"), ("next", "mem"), ("base", "mem")]
    {
        let path = file(&dir.path().join(bundle), kind);
        let good = std::fs::read(&path).unwrap();
        let mut found = 0;
        for i in (0..good.len()).step_by(good.len() / 40 + 1) {
            let mut bad = good.clone();
            bad[i] ^= 1 << (i % 8);
            std::fs::write(&path, &bad).unwrap();
            let opened = open(&address, "next");
            match opened.and_then(|chain| chain.verify().and_then(|_| read(&chain))) {
                Ok(seen) => {
                    assert!(seen == right, "{bundle}/{kind}: byte {i} changed what is read")
                }
                Err(e) => {
                    found += 1;
                    assert!(e.to_string().contains("ferry://host1:7001/"), "{e}");
                }
            }
        }
        std::fs::write(&path, &good).unwrap();
        assert!(found > 10, "{bundle}/{kind}: {found}");
    }
}

#[test]
fn a_file_that_was_cut_is_an_error_where_it_ends_and_not_before() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::<Address>::default());
    let memory = large();
    save(&dir.path().join("b"), &memory, None).unwrap();
    let _lender = Lender::of(&address, dir.path());
    let chain = open(&address, "b").unwrap();
    let cut = chain.place_of(300).unwrap().at;
    let path = file(&dir.path().join("b"), "mem");
    std::fs::File::options().write(true).open(&path).unwrap().set_len(cut).unwrap();
    // What is read ahead fails beyond it, which is nothing to whoever reads in front.
    let mut pages = Pages::new(chain);
    for gfn in 0..256 {
        assert!(pages.page(gfn).unwrap() == Some(memory[&gfn].as_slice()), "page {gfn}");
    }
    let why = pages.page(300).unwrap_err().to_string();
    assert!(why.contains("cannot read ferry://host1:7001/b/memory-"), "{why}");
    assert!(pages.page(2).unwrap() == Some(memory[&2].as_slice()));
}
