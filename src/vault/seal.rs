//! Seals what must not lie open on disk: AES-256-GCM under a master key that lies elsewhere.
//!
//! ```text
//! "sk-…", its name ──seal──> "v1.KEYID.BASE64(nonce | ciphertext | tag)" ──open, same name──> Secret("sk-…")
//! ```
//!
//! A sealed text opens under its own name only (account, gateway, provider, alias): moved to another name it is rubbish. The key id
//! says which master key it needs, so that an old key can be read beside a new one until everything is sealed anew. Where sealed texts
//! are kept is for others to know.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use aes_gcm::aead::rand_core::RngCore;
use aes_gcm::aead::{Aead, AeadCore, KeyInit, OsRng, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use crate::base::{Error, Result, Secret};
use crate::store::snapshot;

/// Before the key id; another way of sealing would be another word.
const FORMAT: &str = "v1";
const NONCE: usize = 12;

/// 32 bytes that everything is sealed under. Prints as its id.
#[derive(Clone)]
pub struct MasterKey {
    /// 16 hex digits that follow from the bytes and do not tell them.
    id: String,
    bytes: Zeroizing<[u8; 32]>,
}

impl MasterKey {
    /// A fresh one, from the system's source of randomness.
    pub fn random() -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        OsRng.fill_bytes(bytes.as_mut_slice());
        Self::new(bytes)
    }

    /// The key in a file: 64 hex digits, base64 of 32 bytes, or 32 raw bytes.
    ///
    /// # Errors
    /// `BadInput` when it cannot be read, everybody may read it, or it holds anything else.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let wrong = |words: String| Error::bad_input(format!("master key file {shown}: {words}"));
        let mut text = Zeroizing::new(Vec::new());
        let mut file = File::open(path).map_err(|error| {
            wrong(format!("cannot be read ({error}); correct the path, or make a key with neurond keys init"))
        })?;
        let about = file.metadata().map_err(|error| wrong(format!("cannot be looked at ({error})")))?;
        // Bits of the group are left alone: what systemd hands over in $CREDENTIALS_DIRECTORY may have them.
        if about.permissions().mode() & 0o007 != 0 {
            return Err(wrong(format!("everybody on this machine may use it; chmod 600 {shown}")));
        }
        file.by_ref().take(256).read_to_end(&mut text).map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let bytes = parse(&text).map_err(|what| {
            wrong(format!(
                "{what}; write 64 hex digits, or make a key with neurond keys init: openssl rand -hex 32 makes one too"
            ))
        })?;
        Ok(Self::new(bytes))
    }

    /// Writes it to a new file that only the daemon's user can read.
    ///
    /// # Errors
    /// `BadInput` when there is such a file, or it cannot be written.
    pub fn write_new(&self, path: &Path) -> Result<()> {
        let wrong = |words: String| Error::bad_input(format!("master key file {}: {words}", path.display()));
        if path.symlink_metadata().is_ok() {
            return Err(wrong("is there already; what it sealed needs it, so it is not replaced".into()));
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| wrong(format!("its folder cannot be made ({error})")))?;
        }
        let mut text = Zeroizing::new(hex(self.bytes.as_slice()));
        text.push('\n');
        snapshot::write(path, text.as_bytes(), snapshot::PRIVATE)
            .map_err(|error| wrong(format!("cannot be written ({error})")))
    }

    /// Which key this is, for logs and for sealed texts.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn new(bytes: Zeroizing<[u8; 32]>) -> Self {
        let id = blake3::derive_key("neurond 2026 id of a master key", bytes.as_slice());
        Self { id: hex(&id[..8]), bytes }
    }

    fn cipher(&self) -> Aes256Gcm {
        Aes256Gcm::new(Key::<Aes256Gcm>::from_slice(self.bytes.as_slice()))
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MasterKey({})", self.id)
    }
}

/// Seals under one key and opens what that one or an earlier one sealed.
#[derive(Debug)]
pub struct Sealer {
    current: OnceLock<MasterKey>,
    /// Where a key is made when the first secret comes and there is none.
    create: Option<PathBuf>,
    earlier: Vec<MasterKey>,
}

impl Sealer {
    /// Keys that are at hand.
    pub fn new(current: MasterKey, earlier: Vec<MasterKey>) -> Self {
        Self { current: OnceLock::from(current), create: None, earlier }
    }

    /// The key in `file`, which must be there; without that the one in `default`, which is made when the first secret is to be
    /// sealed. `earlier` files open what they sealed. A rotation that was cut short left its new key beside the old one: it is read
    /// as well.
    ///
    /// # Errors
    /// As [`MasterKey::read`].
    pub fn open_files(file: Option<&Path>, default: Option<&Path>, earlier: &[PathBuf]) -> Result<Self> {
        let mut keys = earlier.iter().map(|path| MasterKey::read(path)).collect::<Result<Vec<_>>>()?;
        let current = OnceLock::new();
        if let Some(path) = file.or(default.filter(|path| path.exists())) {
            // Nobody else has the cell.
            let _ = current.set(MasterKey::read(path)?);
        }
        if let Some(coming) = file.or(default).map(rotating).filter(|path| path.exists()) {
            keys.push(MasterKey::read(&coming)?);
        }
        let create = default.filter(|_| file.is_none()).map(Path::to_path_buf);
        Ok(Self { current, create, earlier: keys })
    }

    /// Seals a secret under its name.
    ///
    /// # Errors
    /// When there is no key and no place to make one.
    pub fn seal(&self, name: &[&str], secret: &str) -> Result<String> {
        let key = self.current()?;
        let nonce = Aes256Gcm::generate_nonce(&mut OsRng);
        let payload = Payload { msg: secret.as_bytes(), aad: &bound(name, &key.id) };
        let sealed = key.cipher().encrypt(&nonce, payload).map_err(|_| Error::internal("a secret cannot be sealed"))?;
        let whole = [nonce.as_slice(), &sealed].concat();
        Ok(format!("{FORMAT}.{}.{}", key.id, URL_SAFE_NO_PAD.encode(whole)))
    }

    /// Opens what was sealed under this name.
    ///
    /// # Errors
    /// `BadInput` when no key at hand sealed it, or it was sealed under another name, or is damaged.
    pub fn open(&self, name: &[&str], sealed: &str) -> Result<Secret<String>> {
        let wrong = |words: String| Error::bad_input(format!("the secret of {} {words}", name.join("/")));
        let (id, text) = split(sealed).ok_or_else(|| wrong("is not sealed as it should be".into()))?;
        let key = self.current.get().into_iter().chain(&self.earlier).find(|key| key.id == id).ok_or_else(|| {
            wrong(format!(
                "was sealed under master key {id}, which is not at hand: name its file in vault.previous_key_files"
            ))
        })?;
        let whole = URL_SAFE_NO_PAD.decode(text).map_err(|_| wrong("is damaged".into()))?;
        let (nonce, msg) = whole.split_at_checked(NONCE).ok_or_else(|| wrong("is damaged".into()))?;
        let payload = Payload { msg, aad: &bound(name, &key.id) };
        let open = key.cipher().decrypt(Nonce::from_slice(nonce), payload);
        let open = open.map_err(|_| wrong("is damaged, or belongs to another name".into()))?;
        String::from_utf8(open).map(Secret::new).map_err(|_| wrong("is not text".into()))
    }

    /// The same secret under the current key; `None` if that sealed it already.
    ///
    /// # Errors
    /// As [`Self::open`] and [`Self::seal`].
    pub fn reseal(&self, name: &[&str], sealed: &str) -> Result<Option<String>> {
        let current = self.current.get();
        if current.is_some_and(|key| split(sealed).is_some_and(|(id, _)| id == key.id)) {
            return Ok(None);
        }
        self.seal(name, self.open(name, sealed)?.expose()).map(Some)
    }

    fn current(&self) -> Result<&MasterKey> {
        if let Some(key) = self.current.get() {
            return Ok(key);
        }
        let Some(path) = &self.create else {
            return Err(Error::unsupported(
                "Secrets cannot be stored here: there is no master key. The operator has to name one in vault.master_key_file.",
            ));
        };
        let key = MasterKey::random();
        key.write_new(path)?;
        tracing::info!(path = %path.display(), key = key.id(), "master key made; keep a copy of it elsewhere than of what it seals");
        Ok(self.current.get_or_init(|| key))
    }
}

/// A fresh token for callers: 256 bits, in letters that need no quoting.
pub fn random_token() -> Secret<String> {
    let mut bytes = Zeroizing::new([0; 32]);
    OsRng.fill_bytes(bytes.as_mut_slice());
    Secret::new(format!("nd-{}", URL_SAFE_NO_PAD.encode(bytes.as_slice())))
}

/// Whether a text looks as [`Sealer::seal`] writes it.
pub fn is_sealed(text: &str) -> bool {
    split(text).is_some()
}

/// Where a rotation keeps the new key until everything is sealed under it.
pub fn rotating(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Key id and base64.
fn split(sealed: &str) -> Option<(&str, &str)> {
    let (id, text) = sealed.strip_prefix(FORMAT)?.strip_prefix('.')?.split_once('.')?;
    (id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) && !text.is_empty()).then_some((id, text))
}

/// What a sealed text is bound to: format, key and name, each part with its length so that no two names read alike.
fn bound(name: &[&str], id: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in [FORMAT, id].iter().chain(name) {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part.as_bytes());
    }
    bytes
}

fn parse(text: &[u8]) -> Result<Zeroizing<[u8; 32]>, &'static str> {
    let fits = |bytes: &[u8]| <[u8; 32]>::try_from(bytes).ok().map(Zeroizing::new);
    if text.is_empty() {
        return Err("is empty");
    }
    let words = std::str::from_utf8(text).map(str::trim).unwrap_or_default();
    if words.len() == 64 && words.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let mut bytes = Zeroizing::new([0; 32]);
        for (byte, pair) in bytes.iter_mut().zip(words.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).unwrap_or_default();
            *byte = u8::from_str_radix(pair, 16).unwrap_or_default();
        }
        return Ok(bytes);
    }
    for engine in [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD] {
        let decoded = engine.decode(words).map(Zeroizing::new);
        if let Some(bytes) = decoded.ok().and_then(|bytes| fits(&bytes)) {
            return Ok(bytes);
        }
    }
    // 32 random bytes are hardly ever all printable; 32 characters are a password.
    if text.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) {
        return Err("is neither 64 hex digits nor base64 of 32 bytes");
    }
    fits(text).ok_or("is not 32 bytes long")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: [&str; 4] = ["acme", "prod", "openai", "default"];

    #[test]
    fn a_secret_opens_under_its_own_name_and_key_only() {
        let key = MasterKey::random();
        let sealer = Sealer::new(key.clone(), vec![]);
        let sealed = sealer.seal(&NAME, "sk-very-secret").unwrap();
        assert!(is_sealed(&sealed) && !sealed.contains("secret"), "{sealed}");
        assert_eq!(sealer.open(&NAME, &sealed).unwrap().expose(), "sk-very-secret");
        assert_ne!(sealer.seal(&NAME, "sk-very-secret").unwrap(), sealed, "equal secrets cannot be told");
        let refused = |sealer: &Sealer, name: &[&str], sealed: &str, words: &str| {
            let error = sealer.open(name, sealed).unwrap_err();
            assert!(error.message().contains(words), "{error}");
            assert!(!format!("{error:?}").contains("very-secret"), "{error:?}");
        };
        for at in 0..4 {
            let mut name = NAME;
            name[at] = "other";
            refused(&sealer, &name, &sealed, "another name");
        }
        // The same letters, divided differently.
        refused(&sealer, &["acm", "eprod", "openai", "default"], &sealed, "another name");
        refused(&sealer, &["acme", "prod", "openai"], &sealed, "another name");
        refused(&Sealer::new(MasterKey::random(), vec![]), &NAME, &sealed, "previous_key_files");
        let mut damaged = sealed.clone().into_bytes();
        let middle = damaged.len() - 10;
        damaged[middle] = if damaged[middle] == b'A' { b'B' } else { b'A' };
        refused(&sealer, &NAME, std::str::from_utf8(&damaged).unwrap(), "damaged");
        for text in ["", "sk-plain", "v1.0123456789abcdef.", "v1.xyz.AAAA", &format!("v1.{}.AAAA", key.id())] {
            assert!(sealer.open(&NAME, text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_an_earlier_key_sealed_opens_and_is_sealed_anew_once() {
        let (old, new) = (MasterKey::random(), MasterKey::random());
        let sealed = Sealer::new(old.clone(), vec![]).seal(&NAME, "sk-1").unwrap();
        let both = Sealer::new(new.clone(), vec![old]);
        let again = both.reseal(&NAME, &sealed).unwrap().unwrap();
        assert_eq!(both.reseal(&NAME, &again).unwrap(), None);
        assert_eq!(Sealer::new(new, vec![]).open(&NAME, &again).unwrap().expose(), "sk-1");
    }

    #[test]
    fn key_files_are_read_in_three_spellings_and_everything_else_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let put = |bytes: &[u8], mode: u32| {
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            MasterKey::read(&path)
        };
        let raw: Vec<u8> = (0..32).map(|n| n * 7).collect();
        let id = put(&raw, 0o600).unwrap().id().to_owned();
        let standard = STANDARD.encode(&raw);
        for text in [hex(&raw), hex(&raw).to_uppercase() + "\n", standard.clone() + "\n", URL_SAFE_NO_PAD.encode(&raw)]
        {
            assert_eq!(put(text.as_bytes(), 0o400).unwrap().id(), id, "{text}");
        }
        let refused = |bytes: &[u8], mode: u32, words: &str| {
            let error = put(bytes, mode).unwrap_err();
            assert!(error.message().contains(words), "{error}");
            assert!(!error.message().contains(&standard), "{error}");
        };
        refused(standard.as_bytes(), 0o644, "chmod 600");
        refused(standard.as_bytes(), 0o602, "chmod 600");
        refused(b"", 0o600, "is empty");
        refused(b"correct horse battery staple 123", 0o600, "64 hex digits");
        refused(&raw[..31], 0o600, "32 bytes long");
        std::fs::remove_file(&path).unwrap();
        assert!(MasterKey::read(&path).unwrap_err().message().contains("neurond keys init"));
    }

    #[test]
    fn without_a_key_file_one_is_made_for_the_first_secret_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let default = folder.path().join("state/master.key");
        let sealer = Sealer::open_files(None, Some(&default), &[]).unwrap();
        assert!(!default.exists());
        let sealed = sealer.seal(&NAME, "sk-1").unwrap();
        assert_eq!(std::fs::metadata(&default).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Sealer::open_files(None, Some(&default), &[]).unwrap();
        assert_eq!(again.open(&NAME, &sealed).unwrap().expose(), "sk-1");
        let named = folder.path().join("named.key");
        assert!(Sealer::open_files(Some(&named), Some(&default), &[]).is_err(), "a file that is named must be there");
        assert!(MasterKey::random().write_new(&default).unwrap_err().message().contains("already"));
        let nowhere = Sealer::open_files(None, None, &[]).unwrap();
        assert!(nowhere.seal(&NAME, "sk-1").unwrap_err().message().contains("vault.master_key_file"));
    }

    #[test]
    fn a_rotation_cut_short_and_earlier_files_leave_nothing_closed() {
        let folder = tempfile::tempdir().unwrap();
        let [current, coming, earlier] = ["key", "key.new", "earlier"].map(|name| folder.path().join(name));
        let sealed = [&current, &coming, &earlier].map(|path| {
            let key = MasterKey::random();
            key.write_new(path).unwrap();
            Sealer::new(key, vec![]).seal(&NAME, "sk-1").unwrap()
        });
        assert_eq!(rotating(&current), coming);
        let sealer = Sealer::open_files(Some(&current), None, &[earlier]).unwrap();
        for text in &sealed {
            assert_eq!(sealer.open(&NAME, text).unwrap().expose(), "sk-1");
        }
    }

    #[test]
    fn keys_print_as_their_id() {
        let key = MasterKey::random();
        let shown = format!("{key:?} {:?}", Sealer::new(key.clone(), vec![key.clone()]));
        assert!(shown.contains(key.id()) && !shown.contains(&hex(key.bytes.as_slice())), "{shown}");
    }
}
