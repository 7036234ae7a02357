// Package fleet is the verifier's server side: the registry of devices,
// tickets and reference values, enrolment, and the HTTP API. All state is in
// attest/store, so that any number of verifiers may serve one organisation;
// judging is done by attest/verifier.
package fleet

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/tpm"
)

// Device is one enrolled device. Identity never changes after enrolment; a
// permit puts another record in its place (Former keeps this one).
type Device struct {
	ID            attest.Digest `json:"device_id"`
	EK            []byte        `json:"ek"` // TPMT_PUBLIC
	EKCertificate []byte        `json:"ek_certificate"`
	AK            []byte        `json:"ak"` // TPMT_PUBLIC
	TicketID      string        `json:"ticket_id"`
	Enrolled      time.Time     `json:"enrolled"`

	// Of the last affirming evidence. They stand in Seen, not in the record of
	// the identity.
	Clock    *tpm.Clock `json:"clock,omitempty"`
	Firmware uint64     `json:"tpm_firmware,omitempty"`
	Affirmed time.Time  `json:"affirmed,omitzero"`
	Image    string     `json:"image,omitempty"`

	// Of the last evidence that the device itself has signed.
	Last   time.Time     `json:"last,omitzero"`
	Status attest.Status `json:"status,omitzero"`
	Reason attest.Reason `json:"reason,omitzero"`
}

// Seen is what the attestations of a device leave: one small record, replaced
// by each in the transaction that uses up its nonce.
type Seen struct {
	Clock    *tpm.Clock     `json:"clock,omitempty"`
	Firmware uint64         `json:"tpm_firmware,omitempty"`
	Affirmed time.Time      `json:"affirmed,omitzero"`
	Image    string         `json:"image,omitempty"`
	Last     time.Time      `json:"last"`
	Status   attest.Status  `json:"status"`
	Reason   attest.Reason  `json:"reason,omitzero"`
	Volume   *attest.Digest `json:"volume,omitempty"` // work disk: what the first use of its key measured
	Used     []usedNonce    `json:"used"`             // oldest first

	Reports []ReportInfo `json:"reports,omitempty"` // the last ones, oldest first

	// Unsafe: the last evidence was refused for a clock that is not safe.
	Unsafe bool `json:"unsafe,omitempty"`
}

// with returns the device as people see it.
func (d Device) with(s Seen) Device {
	d.Clock, d.Firmware, d.Affirmed, d.Image = s.Clock, s.Firmware, s.Affirmed, s.Image
	d.Last, d.Status, d.Reason = s.Last, s.Status, s.Reason
	return d
}

// Ticket lets devices enrol. The text that devices present is not stored.
type Ticket struct {
	ID      string        `json:"id"`     // first digits of Digest
	Digest  attest.Digest `json:"digest"` // SHA-256 of the text
	Uses    int           `json:"uses"`   // left
	Expires time.Time     `json:"expires"`
}

// ReferenceID names reference values in the registry.
func ReferenceID(r attest.ReferenceValues) string { return r.Image + " " + r.Version }

// keys names the records of one organisation in the store:
//
//	device/ID           Device, its identity
//	seen/ID             Seen
//	ak/SHA256           device id: whose attestation key it is or was
//	former/ID           []Former, oldest first
//	ticket/ID           Ticket
//	purchase/EKDIGEST   Purchase
//	permits/SUBJECT     []Permit, whose enrolment they are for
//	recovery/APPROVAL   Recovery, a release of a recovery key
//	escrows/ID          []seal.Escrow, recovery keys that only the organisation opens
//	card/ID             card: permits and request of a laptop's smart card
//	logons/ID           []attest.LogonEvent of that card, the newest last
//	enrolment/SESSION   pending, with a lease
//	shared/...          what every verifier follows in memory, see shared
type keys string

func keysOf(organization string) keys {
	return keys("/sekisho/1/" + url.PathEscape(organization) + "/")
}

func (k keys) device(id attest.Digest) string   { return string(k) + "device/" + id.String() }
func (k keys) seen(id attest.Digest) string     { return string(k) + "seen/" + id.String() }
func (k keys) ak(d attest.Digest) string        { return string(k) + "ak/" + d.String() }
func (k keys) former(id attest.Digest) string   { return string(k) + "former/" + id.String() }
func (k keys) ticket(id string) string          { return string(k) + "ticket/" + url.PathEscape(id) }
func (k keys) purchase(d attest.Digest) string  { return string(k) + "purchase/" + d.String() }
func (k keys) permits(id attest.Digest) string  { return string(k) + "permits/" + id.String() }
func (k keys) escrows(id attest.Digest) string  { return string(k) + "escrows/" + id.String() }
func (k keys) card(id attest.Digest) string     { return string(k) + "card/" + id.String() }
func (k keys) logons(id attest.Digest) string   { return string(k) + "logons/" + id.String() }
func (k keys) enrolment(session []byte) string  { return k.enrolments() + hex.EncodeToString(session) }
func (k keys) enrolments() string               { return string(k) + "enrolment/" }
func (k keys) shared() string                   { return string(k) + "shared/" }
func (k keys) reference(id string) string       { return k.shared() + "reference/" + url.PathEscape(id) }
func (k keys) firmware(id attest.Digest) string { return k.shared() + "firmware/device/" + id.String() }
func (k keys) otherFirmware(org string) string {
	return k.shared() + "firmware/organization/" + url.PathEscape(org)
}
func (k keys) policyVersion(v uint64) string {
	return fmt.Sprintf("%spolicy/version/%020d", k.shared(), v)
}
func (k keys) revocation(id attest.Digest) string {
	return k.shared() + "revoked/device/" + id.String()
}
func (k keys) revocationOf(v attest.Revocation) string { return k.shared() + "revoked/" + v.Subject() }
func (k keys) revocationCount() string                 { return k.shared() + "revoked/count" }
func (k keys) policy(what string) string               { return k.shared() + "policy/" + what }

// read reads one record within a transaction.
func read[T any](t concurrency.STM, key string) (v T, found bool, err error) {
	data := t.Get(key)
	if data == "" {
		return v, false, nil
	}
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return v, false, fmt.Errorf("store: %s: %w", key, err)
	}
	return v, true, nil
}

// write writes one record within a transaction.
func write(t concurrency.STM, key string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store: %s: %w", key, err)
	}
	t.Put(key, string(data))
	return nil
}

// scan calls f with each record of a kind, in the order of their keys.
func scan[T any](ctx context.Context, s *Service, kind string, f func(T)) error {
	_, err := s.Store.Scan(ctx, string(s.keys)+kind+"/", 0, func(kv *mvccpb.KeyValue) error {
		var v T
		if err := json.Unmarshal(kv.Value, &v); err != nil {
			return fmt.Errorf("store: %s: %w", kv.Key, err)
		}
		f(v)
		return nil
	})
	return err
}

// Devices lists the enrolled devices in the order of their ids.
func (s *Service) Devices(ctx context.Context) ([]Device, error) {
	list := []Device{}
	if err := scan(ctx, s, "device", func(d Device) { list = append(list, d) }); err != nil {
		return nil, err
	}
	seen := make(map[attest.Digest]Seen, len(list))
	prefix := len(s.keys) + len("seen/")
	if _, err := s.Store.Scan(ctx, string(s.keys)+"seen/", 0, func(kv *mvccpb.KeyValue) error {
		var id attest.Digest
		var v Seen
		if err := id.UnmarshalText(kv.Key[prefix:]); err != nil {
			return fmt.Errorf("store: %s: %w", kv.Key, err)
		}
		if err := json.Unmarshal(kv.Value, &v); err != nil {
			return fmt.Errorf("store: %s: %w", kv.Key, err)
		}
		seen[id] = v
		return nil
	}); err != nil {
		return nil, err
	}
	for i, d := range list {
		list[i] = d.with(seen[d.ID])
	}
	return list, nil
}

// Device returns one enrolled device.
func (s *Service) Device(ctx context.Context, id attest.Digest) (d Device, found bool, err error) {
	err = s.Store.Read(ctx, func(t concurrency.STM) error {
		if d, found, err = read[Device](t, s.keys.device(id)); err != nil || !found {
			return err
		}
		seen, _, err := read[Seen](t, s.keys.seen(id))
		d = d.with(seen)
		return err
	})
	return d, found, err
}

// Tickets lists the tickets, without their texts.
func (s *Service) Tickets(ctx context.Context) ([]Ticket, error) {
	list := []Ticket{}
	return list, scan(ctx, s, "ticket", func(t Ticket) { list = append(list, t) })
}
