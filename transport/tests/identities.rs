//! `ferry pki init` and what is wrong with an identity.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use ferry_transport::pki::{Created, Validity, init, init_for};
use ferry_transport::{Identity, PkiError};
use tempfile::TempDir;

fn hosts(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn made(names: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    init(dir.path(), &hosts(names)).unwrap();
    dir
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn hosts_can_be_added_under_the_authority_that_is_there() {
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("pki");
    let created = init(&dir, &[]).unwrap();
    assert_eq!(
        created,
        [
            Created::Authority(dir.join("authority.pem")),
            Created::Host("host".into(), dir.join("host"))
        ]
    );
    let authority = fs::read(dir.join("authority.pem")).unwrap();
    let created = init(&dir, &hosts(&["a", "b.example"])).unwrap();
    assert_eq!(created.len(), 2);
    assert_eq!(fs::read(dir.join("authority.pem")).unwrap(), authority);
    for name in ["host", "a", "b.example"] {
        assert_eq!(Identity::load(&dir.join(name)).unwrap().name(), name);
    }
}

#[test]
fn keys_are_for_their_owner_only_and_nothing_unfinished_stays() {
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("pki");
    init(&dir, &hosts(&["a"])).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("a")), 0o700);
    assert_eq!(mode(&dir.join("authority.key")), 0o600);
    assert_eq!(mode(&dir.join("a/key.pem")), 0o600);
    let mut names: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "authority.key", "authority.pem"]);
}

#[test]
fn a_key_that_others_can_reach_is_refused_with_what_to_do() {
    let dir = made(&["a"]);
    let (host, authority) = (dir.path().join("a/key.pem"), dir.path().join("authority.key"));
    let set = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode));
    for mode in [0o601, 0o604, 0o620, 0o644, 0o666] {
        set(&host, mode).unwrap();
        set(&authority, mode).unwrap();
        let refused = Identity::load(&dir.path().join("a")).unwrap_err().to_string();
        assert!(refused.contains(&format!("chmod 600 {}", host.display())), "{refused}");
        assert!(refused.contains(&format!("{mode:o}")), "{refused}");
        let refused = init(dir.path(), &hosts(&["b"])).unwrap_err();
        assert!(
            matches!(&refused, PkiError::Exposed { path, .. } if *path == authority),
            "{refused}"
        );
    }
    set(&host, 0o600).unwrap();
    Identity::load(&dir.path().join("a")).unwrap();
    // A key of root may be for a service's group as well; any other owner's may not.
    set(&host, 0o640).unwrap();
    let of_root = fs::metadata(&host).unwrap().uid() == 0;
    assert_eq!(Identity::load(&dir.path().join("a")).is_ok(), of_root);
    if of_root {
        std::os::unix::fs::chown(&host, Some(65_534), None).unwrap();
        Identity::load(&dir.path().join("a")).unwrap_err();
    } else {
        println!("SKIP: only root has keys of root");
    }
}

#[test]
fn an_identity_is_never_overwritten() {
    let dir = made(&["a"]);
    let key = fs::read(dir.path().join("a/key.pem")).unwrap();
    let error = init(dir.path(), &hosts(&["b", "a"])).unwrap_err();
    assert!(matches!(&error, PkiError::Exists { name, .. } if name == "a"), "{error}");
    assert_eq!(fs::read(dir.path().join("a/key.pem")).unwrap(), key);
    assert!(!dir.path().join("b").exists(), "nothing is made when one name is taken");
    let error = init(dir.path(), &hosts(&["c", "c"])).unwrap_err();
    assert!(matches!(error, PkiError::Exists { .. }), "{error}");
}

#[test]
fn names_that_would_leave_the_directory_are_refused() {
    let dir = TempDir::new().unwrap();
    let long = "x".repeat(64);
    for name in
        ["", ".", "..", "../a", "a/b", "-a", "a-", "a b", "é", "a..b", "authority.key", &long]
    {
        let error = init(dir.path(), &hosts(&[name])).unwrap_err();
        assert!(matches!(error, PkiError::Name { .. }), "{name}: {error}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn half_an_authority_is_not_replaced() {
    let dir = made(&["a"]);
    fs::remove_file(dir.path().join("authority.key")).unwrap();
    let error = init(dir.path(), &hosts(&["b"])).unwrap_err();
    assert!(error.to_string().contains("authority.key"), "{error}");
    assert!(matches!(error, PkiError::HalfAuthority { .. }));
}

#[test]
fn what_is_missing_from_an_identity_is_named() {
    let dir = made(&["a"]);
    let a = dir.path().join("a");
    for file in ["cert.pem", "key.pem", "authority.pem"] {
        let content = fs::read(a.join(file)).unwrap();
        fs::rename(a.join(file), a.join("aside")).unwrap();
        let error = Identity::load(&a).unwrap_err();
        assert!(matches!(&error, PkiError::Missing { file: f, .. } if *f == file), "{error}");
        // In place, with the permissions that it has.
        fs::rename(a.join("aside"), a.join(file)).unwrap();
        fs::write(a.join(file), b"nonsense").unwrap();
        let error = Identity::load(&a).unwrap_err();
        assert!(
            matches!(&error, PkiError::Content { path, .. } if path.ends_with(file)),
            "{error}"
        );
        fs::write(a.join(file), content).unwrap();
    }
    let error = Identity::load(&dir.path().join("nobody")).unwrap_err();
    assert!(matches!(error, PkiError::NoDirectory { .. }), "{error}");
    // The whole directory instead of a host's folder in it.
    let error = Identity::load(dir.path()).unwrap_err();
    assert!(matches!(error, PkiError::Missing { .. }), "{error}");
}

#[test]
fn a_key_of_another_host_is_noticed() {
    let dir = made(&["a", "b"]);
    fs::copy(dir.path().join("b/key.pem"), dir.path().join("a/key.pem")).unwrap();
    let error = Identity::load(&dir.path().join("a")).unwrap_err();
    assert!(matches!(error, PkiError::KeyMismatch { .. }), "{error}");
}

#[test]
fn a_certificate_of_another_authority_is_noticed() {
    let (one, two) = (made(&["a"]), made(&["a"]));
    fs::copy(two.path().join("a/authority.pem"), one.path().join("a/authority.pem")).unwrap();
    let error = Identity::load(&one.path().join("a")).unwrap_err();
    assert!(matches!(error, PkiError::OtherAuthority { .. }), "{error}");
}

#[test]
fn dates_are_checked_and_told() {
    let dir = TempDir::new().unwrap();
    let hour = Duration::from_secs(3600);
    let from = SystemTime::now() - hour;
    let validity = Validity { from, authority: 1000 * hour, host: 10 * hour };
    init_for(dir.path(), &hosts(&["a"]), &validity).unwrap();
    let a = dir.path().join("a");
    Identity::load_at(&a, from + 9 * hour).unwrap();
    let late = Identity::load_at(&a, from + 11 * hour).unwrap_err();
    assert!(matches!(&late, PkiError::Expired { date, .. } if date.ends_with('Z')), "{late}");
    let early = Identity::load_at(&a, from - hour).unwrap_err();
    assert!(matches!(early, PkiError::NotYetValid { .. }), "{early}");
}
