package attest

import "fmt"

// Reason says why something was refused or is not in force. The numbers leave
// the process and never change; the zero value means that nothing is wrong or
// nothing is known, and never opens anything by itself.
type Reason uint16

// Reasons of an appraisal, in the order of the checks.
const (
	ReasonNone              Reason = 0
	ReasonEvidenceMalformed Reason = 1
	ReasonEvidenceTooLarge  Reason = 2
	ReasonVerifierMismatch  Reason = 3 // made for another verifier
	ReasonPurposeMismatch   Reason = 4
	ReasonNonceInvalid      Reason = 5 // not one of this verifier's nonces
	ReasonNonceExpired      Reason = 6
	ReasonNonceReused       Reason = 7
	ReasonDeviceMismatch    Reason = 8 // nonce was given to another device
	ReasonDeviceUnknown     Reason = 9
	ReasonSignatureInvalid  Reason = 10 // quote not signed by the enrolled AK
	ReasonQuoteMagic        Reason = 11
	ReasonQuoteType         Reason = 12
	ReasonQuoteSigner       Reason = 13
	ReasonBindingMismatch   Reason = 14 // extraData
	ReasonPCRSelection      Reason = 15
	ReasonPCRDigest         Reason = 16
	ReasonClockReversed     Reason = 17
	ReasonClockUnsafe       Reason = 18
	ReasonKeyNotCertified   Reason = 19
	ReasonKeyAttributes     Reason = 20
	ReasonLogTooLarge       Reason = 21
	ReasonLogMalformed      Reason = 22
	ReasonLogNoSHA256       Reason = 23
	ReasonLogMissingEvents  Reason = 24 // a PCR was extended and the log does not say by what
	ReasonLogReplay         Reason = 25
	ReasonLogSeparator      Reason = 26
	ReasonLogEventType      Reason = 27 // a type that has no place in its PCR
	ReasonLogEventDigest    Reason = 28 // a digest that is not of the data it covers
	ReasonLogOrder          Reason = 29 // an event that is out of its place
	ReasonRunLogMalformed   Reason = 36 // our own log of run-time events
	ReasonRunLogReplay      Reason = 37
	ReasonVolumeChanged     Reason = 38 // the disk key that was used is another than the first one seen
	ReasonNoReferenceValues Reason = 30
	ReasonImageMismatch     Reason = 31
	ReasonImageUnknown      Reason = 32
	ReasonSecureBoot        Reason = 33 // PCR 7
	ReasonPolicyRule        Reason = 34 // a rule of the signed policy
	ReasonNoPolicy          Reason = 35 // signed policies are required and none is in force
	ReasonSuspended         Reason = 39 // by an administrator: the device, its key, its user or all
)

// Reasons of enrolment.
const (
	ReasonTicketUnknown    Reason = 50
	ReasonTicketExpired    Reason = 51
	ReasonTicketUsed       Reason = 52
	ReasonEKMissing        Reason = 53 // no EK certificate
	ReasonEKUntrusted      Reason = 54
	ReasonEKMismatch       Reason = 55 // certificate is for another key
	ReasonEKAttributes     Reason = 56
	ReasonAKAttributes     Reason = 57
	ReasonChallengeFailed  Reason = 58
	ReasonChallengeExpired Reason = 59
	ReasonAlreadyEnrolled  Reason = 60
	ReasonRequestMalformed Reason = 61
	ReasonBusy             Reason = 62 // rate or capacity limit; try again later
)

// Reasons that only the device itself gives.
const (
	ReasonNoTPM       Reason = 80
	ReasonTPMFault    Reason = 81
	ReasonNoTicket    Reason = 82
	ReasonUnreachable Reason = 83
	ReasonState       Reason = 84 // state partition
)

// Reasons against a certificate request for a card (attestctl card check).
const (
	ReasonCardSigner     Reason = 100 // the certification is by another attestation key
	ReasonCardAttributes Reason = 101 // kind, attributes or scheme
	ReasonCardPolicy     Reason = 102
	ReasonCardStatement  Reason = 103 // the certification is of another key or place
	ReasonCardCSR        Reason = 104 // PKCS #10 or its signature
	ReasonCardOtherKey   Reason = 105 // the request asks for another key
)

var reasonNames = map[Reason]string{
	ReasonNone:              "",
	ReasonEvidenceMalformed: "evidence-malformed",
	ReasonEvidenceTooLarge:  "evidence-too-large",
	ReasonVerifierMismatch:  "verifier-mismatch",
	ReasonPurposeMismatch:   "purpose-mismatch",
	ReasonNonceInvalid:      "nonce-invalid",
	ReasonNonceExpired:      "nonce-expired",
	ReasonNonceReused:       "nonce-reused",
	ReasonDeviceMismatch:    "device-mismatch",
	ReasonDeviceUnknown:     "device-unknown",
	ReasonSignatureInvalid:  "signature-invalid",
	ReasonQuoteMagic:        "quote-magic",
	ReasonQuoteType:         "quote-type",
	ReasonQuoteSigner:       "quote-signer",
	ReasonBindingMismatch:   "binding-mismatch",
	ReasonPCRSelection:      "pcr-selection",
	ReasonPCRDigest:         "pcr-digest",
	ReasonClockReversed:     "clock-reversed",
	ReasonClockUnsafe:       "clock-unsafe",
	ReasonKeyNotCertified:   "key-not-certified",
	ReasonKeyAttributes:     "key-attributes",
	ReasonLogTooLarge:       "log-too-large",
	ReasonLogMalformed:      "log-malformed",
	ReasonLogNoSHA256:       "log-no-sha256",
	ReasonLogMissingEvents:  "log-missing-events",
	ReasonLogReplay:         "log-replay",
	ReasonLogSeparator:      "log-separator",
	ReasonLogEventType:      "log-event-type",
	ReasonLogEventDigest:    "log-event-digest",
	ReasonLogOrder:          "log-order",
	ReasonRunLogMalformed:   "run-log-malformed",
	ReasonRunLogReplay:      "run-log-replay",
	ReasonVolumeChanged:     "volume-changed",
	ReasonNoReferenceValues: "no-reference-values",
	ReasonImageMismatch:     "image-mismatch",
	ReasonImageUnknown:      "image-unknown",
	ReasonSecureBoot:        "secure-boot-mismatch",
	ReasonPolicyRule:        "policy-rule",
	ReasonNoPolicy:          "no-policy",
	ReasonSuspended:         "suspended",
	ReasonTicketUnknown:     "ticket-unknown",
	ReasonTicketExpired:     "ticket-expired",
	ReasonTicketUsed:        "ticket-used",
	ReasonEKMissing:         "ek-certificate-missing",
	ReasonEKUntrusted:       "ek-certificate-untrusted",
	ReasonEKMismatch:        "ek-certificate-mismatch",
	ReasonEKAttributes:      "ek-attributes",
	ReasonAKAttributes:      "ak-attributes",
	ReasonChallengeFailed:   "challenge-failed",
	ReasonChallengeExpired:  "challenge-expired",
	ReasonAlreadyEnrolled:   "already-enrolled",
	ReasonRequestMalformed:  "request-malformed",
	ReasonBusy:              "busy",
	ReasonNoTPM:             "no-tpm",
	ReasonTPMFault:          "tpm-fault",
	ReasonNoTicket:          "no-ticket",
	ReasonUnreachable:       "verifier-unreachable",
	ReasonState:             "state-partition",
	ReasonCardSigner:        "card-attestation-key",
	ReasonCardAttributes:    "card-key-attributes",
	ReasonCardPolicy:        "card-key-policy",
	ReasonCardStatement:     "card-key-not-certified",
	ReasonCardCSR:           "card-request-signature",
	ReasonCardOtherKey:      "card-request-other-key",
}

func (r Reason) String() string {
	if s, ok := reasonNames[r]; ok {
		return s
	}
	return fmt.Sprintf("reason-%d", uint16(r))
}

// ParseReason is the inverse of Reason.String for the reasons that have a name.
func ParseReason(s string) (Reason, error) {
	for r, name := range reasonNames {
		if name == s {
			return r, nil
		}
	}
	return 0, fmt.Errorf("unknown reason %.64q", s)
}

// MarshalText implements encoding.TextMarshaler.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Reason) UnmarshalText(b []byte) (err error) {
	*r, err = ParseReason(string(b))
	return err
}

// Refusal is a Reason with one sentence for people. It is an error for those
// who pass it up, and the content of a Result for those who appraise.
type Refusal struct {
	Reason Reason `json:"reason"`
	Detail string `json:"detail"`
}

func (r *Refusal) Error() string { return r.Reason.String() + ": " + r.Detail }

// Refuse makes a Refusal.
func Refuse(r Reason, format string, a ...any) *Refusal {
	return &Refusal{r, fmt.Sprintf(format, a...)}
}
