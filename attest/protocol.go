package attest

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"time"
)

// Paths of a verifier's API. Bodies are JSON but for PathAttest's request,
// which is Evidence in CBOR. A refusal of an enrolment is HTTP status 403 with
// a Refusal; a refused appraisal is status 200 with an AttestResponse.
const (
	PathEnrolBegin  = "/v1/enroll/begin"  // POST EnrolRequest → EnrolChallenge
	PathEnrolFinish = "/v1/enroll/finish" // POST EnrolAnswer → Enrolment
	PathChallenge   = "/v1/challenge"     // POST ChallengeRequest → Challenge
	PathAttest      = "/v1/attest"        // POST Evidence → AttestResponse
	PathEscrow      = "/v1/escrow"        // POST EscrowRequest → {}
	PathNetwork     = "/v1/network"       // POST NetworkRequest → NetworkCertificate
	PathUpdate      = "/v1/update"        // POST UpdateRequest → UpdateAnswer
	PathImage       = "/v1/image"         // GET /SHA-256, with the token → the image, by ranges
)

// MaxMessage bounds every JSON body of the API in bytes.
const MaxMessage = 64 << 10

// EnrolRequest begins an enrolment.
type EnrolRequest struct {
	Ticket        string `json:"ticket"`         // secret
	EKCertificate []byte `json:"ek_certificate"` // as it stands in the TPM
	EK            []byte `json:"ek"`             // TPMT_PUBLIC
	AK            []byte `json:"ak"`             // TPMT_PUBLIC
}

// EnrolChallenge holds a secret that only the TPM with both keys can unwrap.
type EnrolChallenge struct {
	Session    []byte `json:"session"`
	Verifier   string `json:"verifier"`
	Credential []byte `json:"credential"` // TPM2B_ID_OBJECT without its size
	Secret     []byte `json:"secret"`     // TPM2B_ENCRYPTED_SECRET without its size
}

// EnrolAnswer proves that the secret was unwrapped, for this exchange only.
type EnrolAnswer struct {
	Session []byte `json:"session"`
	Proof   []byte `json:"proof"` // EnrolProof
}

// Enrolment is what a device keeps of it.
type Enrolment struct {
	Device   Digest    `json:"device_id"`
	Verifier string    `json:"verifier"`
	Enrolled time.Time `json:"enrolled"`
}

// ChallengeRequest asks for a nonce.
type ChallengeRequest struct {
	Device Digest `json:"device_id"`
	Ticket []byte `json:"ticket,omitempty"` // of the Busy that told it to come now
}

// Busy is the answer, with HTTP status 503 or 429, of a verifier that cannot
// take a request now. It also has the header Retry-After.
type Busy struct {
	Reason     Reason `json:"reason"` // ReasonBusy
	Detail     string `json:"detail"`
	RetryAfter int64  `json:"retry_after_ms"`   // then the device's turn has come
	Ticket     []byte `json:"ticket,omitempty"` // shows that it is
}

// Challenge is a nonce for one attestation.
type Challenge struct {
	Nonce    []byte `json:"nonce"`
	Verifier string `json:"verifier"`
}

// AttestResponse carries the result and, if it is affirming, the certificate.
type AttestResponse struct {
	Result Result   `json:"result"`
	Chain  [][]byte `json:"chain,omitempty"` // DER, the device's first
	Token  []byte   `json:"token,omitempty"` // the result as an EAR, signed by the verifier
}

// EscrowRequest hands an escrowed recovery key over. The credential in force
// signs it, so that no one but the device itself has anything stored.
type EscrowRequest struct {
	Escrow    []byte   `json:"escrow"`    // seal.Escrow in JSON
	Chain     [][]byte `json:"chain"`     // DER, the device's certificate first
	Signature []byte   `json:"signature"` // ASN.1, of EscrowDigest
}

// EscrowDigest is what the credential key signs for an escrow.
func EscrowDigest(escrow []byte) Digest {
	h := sha256.New()
	h.Write([]byte("sekisho/escrow/1"))
	h.Write(escrow)
	return Digest(h.Sum(nil))
}

// NetworkRequest asks for the certificate of a laptop's network identity, by
// which networks with 802.1X let it in. The credential in force signs it.
type NetworkRequest struct {
	Request   []byte   `json:"request"`   // PKCS #10, DER
	Chain     [][]byte `json:"chain"`     // DER, the device's certificate first
	Signature []byte   `json:"signature"` // ASN.1, of NetworkDigest
}

// NetworkCertificate is the answer to NetworkRequest.
type NetworkCertificate struct {
	Certificate []byte `json:"certificate"` // DER
}

// NetworkDigest is what the credential key signs for a network identity.
func NetworkDigest(request []byte) Digest {
	h := sha256.New()
	h.Write([]byte("sekisho/network/1"))
	h.Write(request)
	return Digest(h.Sum(nil))
}

// UpdateRequest asks for the release that is to follow the running one. The
// credential in force signs it.
type UpdateRequest struct {
	Version   string   `json:"version"`   // that runs
	Chain     [][]byte `json:"chain"`     // DER, the device's certificate first
	Signature []byte   `json:"signature"` // ASN.1, of UpdateDigest
}

// UpdateAnswer is the release to take, or empty.
type UpdateAnswer struct {
	Manifest []byte `json:"manifest,omitempty"` // signed, attest/release
	Token    string `json:"token,omitempty"`    // for PathImage, as "Authorization: Bearer"
}

// UpdateDigest is what the credential key signs for an UpdateRequest.
func UpdateDigest(version string) Digest {
	return sha256.Sum256([]byte("sekisho/update/1" + version))
}

// EnrolProof is HMAC-SHA-256, keyed with the unwrapped secret, over the whole
// exchange, so that no part of it can come from another one.
func EnrolProof(secret []byte, r EnrolRequest, c EnrolChallenge) ([]byte, error) {
	enc, _, err := codec()
	if err != nil {
		return nil, fmt.Errorf("enrolment: %w", err)
	}
	transcript, err := enc.Marshal([]any{
		"sekisho/enroll/1", r.Ticket, r.EKCertificate, r.EK, r.AK,
		c.Session, c.Verifier, c.Credential, c.Secret,
	})
	if err != nil {
		return nil, fmt.Errorf("enrolment: %w", err)
	}
	digest := sha256.Sum256(transcript)
	h := hmac.New(sha256.New, secret)
	h.Write(digest[:])
	return h.Sum(nil), nil
}
