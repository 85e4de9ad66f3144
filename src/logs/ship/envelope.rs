//! Seals what only the owner of a gateway may read of an exported record.
//!
//! ```text
//! bytes ──AES-256-GCM, a key of its own──> data | tag
//!                     '── RSA-OAEP, SHA-256, the gateway's public key ──> key          {"key":"…","iv":"…","data":"…"}
//! ```
//!
//! The private key is nowhere here: what was sealed cannot be opened again by this machine.

use std::fmt;
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use rsa::pkcs8::DecodePublicKey;
use rsa::sha2::Sha256;
use rsa::traits::PublicKeyParts;
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::json::push_base64;
use crate::base::{Error, Result};

/// A shorter RSA key protects nothing.
const MIN_BITS: usize = 2048;
/// Bytes of the key of a field.
const KEY: usize = 32;
/// Bytes that a field grows by when it is sealed.
pub(super) const TAG: usize = 16;

/// A gateway's key for what is exported: `logpush_public_key`. Cheap to clone.
#[derive(Clone)]
pub struct PublicKey {
    /// As it is kept with the records that it is for.
    der: Arc<[u8]>,
    key: Arc<rsa::PublicKey>,
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RSA key of {} bits", self.key.size() * 8)
    }
}

impl PublicKey {
    /// Reads an RSA key in PEM: `-----BEGIN PUBLIC KEY-----`. Takes a while, so it is made once and kept.
    ///
    /// # Errors
    /// [`Kind::BadInput`](crate::base::Kind::BadInput) if it is anything else, or shorter than 2048 bits.
    pub fn parse(pem: &str) -> Result<Self> {
        let wanted = "logpush_public_key is an RSA key of 2048 to 8192 bits in PEM, beginning with -----BEGIN PUBLIC \
                      KEY-----: openssl genrsa -out private.pem 4096 && openssl rsa -in private.pem -pubout";
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).ok();
        let key = der.and_then(|der| Self::from_der(&der)).filter(|key| key.key.size() * 8 >= MIN_BITS);
        key.ok_or_else(|| Error::bad_field("logpush_public_key", wanted))
    }

    /// Reads what [`PublicKey::der`] gave out.
    pub(super) fn from_der(der: &[u8]) -> Option<Self> {
        let key = rsa::PublicKey::from_public_key_der(der).ok()?;
        Some(Self { der: der.into(), key: Arc::new(key) })
    }

    /// The key as bytes.
    pub(super) fn der(&self) -> &[u8] {
        &self.der
    }

    /// Bytes of a key that it has sealed.
    pub(super) fn size(&self) -> usize {
        self.key.size()
    }

    /// Puts `plain` sealed behind `line`, as a JSON object; `scratch` is overwritten.
    ///
    /// # Errors
    /// If the system has no randomness: nothing is put then.
    pub(super) fn seal(&self, plain: &[u8], line: &mut Vec<u8>, scratch: &mut Vec<u8>) -> Result<()> {
        let failed = |_| Error::internal("the system gives no random numbers");
        let random = SystemRandom::new();
        let (mut key, mut iv) = (Zeroizing::new([0; KEY]), [0; NONCE_LEN]);
        random.fill(key.as_mut_slice()).map_err(failed)?;
        random.fill(&mut iv).map_err(failed)?;
        let unusable = |error: rsa::Error| Error::internal(format!("a field's key could not be sealed: {error}"));
        let wrapped = self.key.oaep_encrypt::<Sha256>(key.as_slice()).map_err(unusable)?;
        let cipher = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_slice()).map_err(failed)?);
        scratch.clear();
        scratch.extend_from_slice(plain);
        let nonce = Nonce::assume_unique_for_key(iv);
        cipher.seal_in_place_append_tag(nonce, Aad::empty(), scratch).map_err(failed)?;
        line.extend_from_slice(b"{\"key\":\"");
        push_base64(&wrapped, line);
        line.extend_from_slice(b"\",\"iv\":\"");
        push_base64(&iv, line);
        line.extend_from_slice(b"\",\"data\":\"");
        push_base64(scratch, line);
        line.extend_from_slice(b"\"}");
        Ok(())
    }
}
