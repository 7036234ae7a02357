package fleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/concurrency"

	"sekisho/attest"
	"sekisho/attest/approval"
	"sekisho/attest/tpm"
)

// approvers gives b two approvers.
func (b *bench) approvers() []*ecdsa.PrivateKey {
	b.t.Helper()
	var keys []*ecdsa.PrivateKey
	var text []byte
	for range 2 {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.t.Fatal(err)
		}
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			b.t.Fatal(err)
		}
		keys = append(keys, k)
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	var err error
	if b.service.Approvers, err = approval.ParseApprovers(text, 2); err != nil {
		b.t.Fatal(err)
	}
	return keys
}

func (b *bench) permit(r PermitRequest, signers ...*ecdsa.PrivateKey) *approval.Signed {
	b.t.Helper()
	if r.Serial == "" {
		r.Serial = rand.Text()
	}
	if r.Expires.IsZero() {
		r.Expires = b.now.Add(24 * time.Hour)
	}
	s, err := approval.New(ApprovePermit, r)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, k := range signers {
		if err := s.Sign(k); err != nil {
			b.t.Fatal(err)
		}
	}
	return s
}

func (b *bench) former() []Former {
	b.t.Helper()
	list, err := b.service.Former(b.t.Context(), attest.Digest{})
	if err != nil {
		b.t.Fatal(err)
	}
	return list
}

// TestPermitRefuses: a permit counts only with two signatures of different
// approvers, in time, once, for a device that is known.
func TestPermitRefuses(t *testing.T) {
	b := newBench(t)
	d := b.device()
	id := deviceID(t, d)
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	request := PermitRequest{Device: id, Reason: "key renewed"}
	none := b.permit(request)
	if _, err := b.service.AddPermit(t.Context(), none); !errors.Is(err, approval.ErrNotApproved) {
		t.Errorf("no approvers configured: %v", err)
	}
	k := b.approvers()
	used := b.permit(request, k...)
	if _, err := b.service.AddPermit(t.Context(), used); err != nil {
		t.Fatal(err)
	}
	other := b.permit(request, k...)
	other.Type = "recovery"
	for name, s := range map[string]*approval.Signed{
		"one signature":         b.permit(request, k[0]),
		"one person twice":      b.permit(request, k[0], k[0]),
		"expired":               b.permit(PermitRequest{Device: id, Expires: b.now}, k...),
		"for years":             b.permit(PermitRequest{Device: id, Expires: b.now.AddDate(2, 0, 0)}, k...),
		"unknown device":        b.permit(PermitRequest{Device: attest.Digest{1}}, k...),
		"replaced by itself":    b.permit(PermitRequest{Device: id, Replacement: &id}, k...),
		"presented twice":       used,
		"approval of something": other,
	} {
		before := b.stored()
		if _, err := b.service.AddPermit(t.Context(), s); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if b.stored() != before {
			t.Errorf("%s: the store changed", name)
		}
	}
}

// TestReenrolment: the same TPM with another attestation key gets in with a
// permit, once, and the old record stays.
func TestReenrolment(t *testing.T) {
	b := newBench(t)
	k := b.approvers()
	d := b.device()
	id := deviceID(t, d)
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	oldAK := d.Identity().AK
	d.Renew()
	if _, err := b.enrol(d, b.ticket(1), nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Fatalf("without a permit: %v", err)
	}
	signed := b.permit(PermitRequest{Device: id, Reason: "key renewed"}, k...)
	p, err := b.service.AddPermit(t.Context(), signed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(d, "", nil); refusal(t, err) != attest.ReasonTicketUnknown {
		t.Errorf("a permit without a ticket: %v", err)
	}
	// A permit is for this device, and for whoever proves to be it.
	thief := b.device()
	if _, err := b.enrol(thief, b.ticket(1), func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) {
		if r.EK != nil {
			own := d.Identity()
			r.EK, r.EKCertificate = own.EK, own.EKCertificate
		}
	}); refusal(t, err) != attest.ReasonChallengeFailed {
		t.Errorf("another TPM by this permit: %v", err)
	}
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	list := b.former()
	if len(list) != 1 || list[0].ID != id || string(list[0].AK) != string(oldAK) || list[0].Permit != p.ID || list[0].ReplacedBy != id {
		t.Errorf("former: %+v", list)
	}
	if res := b.attest(b.evidence(d, id, b.nonce(id))); res.Result.Status != attest.StatusAffirming {
		t.Errorf("after re-enrolment: %s", res.Result.Detail)
	}
	// The permit is used up, and cannot be presented again.
	d.Renew()
	if _, err := b.enrol(d, b.ticket(1), nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("by a used permit: %v", err)
	}
	if _, err := b.service.AddPermit(t.Context(), signed); err == nil {
		t.Error("a used permit was accepted again")
	}
	// The key before does not come back under another identity.
	if _, err := b.store.Update(t.Context(), func(x concurrency.STM) error {
		return b.service.mayTake(x, Device{ID: attest.Digest{5}, AK: oldAK}, b.now)
	}); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("a former key: %v", err)
	}
}

// TestBoardSwap: a permit puts another TPM in a device's place; the old one is
// retired and does not come back by a ticket.
func TestBoardSwap(t *testing.T) {
	b := newBench(t)
	k := b.approvers()
	old, next := b.device(), b.device()
	oldID, nextID := deviceID(t, old), deviceID(t, next)
	if _, err := b.enrol(old, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.service.AddPermit(t.Context(), b.permit(PermitRequest{Device: oldID, Replacement: &nextID, Reason: "board"}, k...)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(next, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	if list := b.former(); len(list) != 1 || list[0].ID != oldID || list[0].ReplacedBy != nextID {
		t.Errorf("former: %+v", list)
	}
	if res := b.attest(b.evidence(old, oldID, b.nonce(oldID))); res.Result.Reason != attest.ReasonDeviceUnknown {
		t.Errorf("the retired board: %s", res.Result.Reason)
	}
	if _, err := b.enrol(old, b.ticket(1), nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("the retired board by a ticket: %v", err)
	}
	if _, err := b.service.AddPermit(t.Context(), b.permit(PermitRequest{Device: oldID, Reason: "repaired"}, k...)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(old, b.ticket(1), nil); err != nil {
		t.Errorf("the retired board by a permit: %v", err)
	}
}

// TestPermitExpiresMeanwhile: what Begin saw is judged again at Finish.
func TestPermitExpiresMeanwhile(t *testing.T) {
	b := newBench(t)
	k := b.approvers()
	d := b.device()
	if _, err := b.enrol(d, b.ticket(1), nil); err != nil {
		t.Fatal(err)
	}
	d.Renew()
	if _, err := b.service.AddPermit(t.Context(), b.permit(PermitRequest{Device: deviceID(t, d), Expires: b.now.Add(time.Minute)}, k...)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(d, b.ticket(1), func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) {
		if a.Proof != nil {
			b.now = b.now.Add(2 * time.Minute)
		}
	}); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Error(err)
	}
}

// TestPurchase: a TPM on the purchase list enrols without a ticket, once; any
// other does not.
func TestPurchase(t *testing.T) {
	b := newBench(t)
	byID, byKey, stranger := b.device(), b.device(), b.device()
	ek, err := tpm.ParsePublic(byKey.Identity().EK)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := ek.SPKI()
	if err != nil {
		t.Fatal(err)
	}
	list := []attest.Digest{deviceID(t, byID), sha256.Sum256(spki)}
	for range 2 {
		if _, err := b.service.AddPurchase(t.Context(), list, "delivery 7"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.enrol(byID, "", nil); err != nil {
		t.Error(err)
	}
	if _, err := b.enrol(byKey, "", nil); err != nil {
		t.Error(err)
	}
	if _, err := b.enrol(byID, "", nil); err != nil {
		t.Errorf("the same keys again, after a lost answer: %v", err)
	}
	byID.Renew()
	if _, err := b.enrol(byID, "", nil); refusal(t, err) != attest.ReasonAlreadyEnrolled {
		t.Errorf("another attestation key: %v", err)
	}
	if _, err := b.enrol(stranger, "", nil); refusal(t, err) != attest.ReasonTicketUnknown {
		t.Errorf("not on the list: %v", err)
	}
	// Being on the list proves nothing by itself.
	if _, err := b.service.AddPurchase(t.Context(), []attest.Digest{deviceID(t, stranger)}, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := b.enrol(b.device(), "", func(r *attest.EnrolRequest, _ *attest.EnrolAnswer) {
		if r.EK != nil {
			id := stranger.Identity()
			r.EK, r.EKCertificate = id.EK, id.EKCertificate
		}
	}); refusal(t, err) != attest.ReasonChallengeFailed {
		t.Errorf("somebody else's endorsement key: %v", err)
	}
}

func TestRevokeTicket(t *testing.T) {
	b := newBench(t)
	text, ticket, err := b.service.CreateTicket(t.Context(), 5, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	// Also for an enrolment under way.
	if _, err := b.enrol(b.device(), text.Reveal(), func(_ *attest.EnrolRequest, a *attest.EnrolAnswer) {
		if a.Proof != nil {
			if err := b.service.RevokeTicket(t.Context(), ticket.ID); err != nil {
				t.Error(err)
			}
		}
	}); refusal(t, err) != attest.ReasonTicketUnknown {
		t.Errorf("under way: %v", err)
	}
	if _, err := b.enrol(b.device(), text.Reveal(), nil); refusal(t, err) != attest.ReasonTicketUnknown {
		t.Errorf("afterwards: %v", err)
	}
	if b.service.RevokeTicket(t.Context(), ticket.ID) == nil {
		t.Error("revoked twice")
	}
}

// TestNoSwitchForSoftwareTPMs: whether a software TPM may enrol is a question
// of ek_roots alone. No field of the configuration, and so no release build,
// can let one in that does not chain to them.
func TestNoSwitchForSoftwareTPMs(t *testing.T) {
	fields := reflect.TypeFor[ServerConfig]()
	for i := range fields.NumField() {
		name := strings.ToLower(fields.Field(i).Tag.Get("json"))
		for _, word := range []string{"software", "swtpm", "insecure", "skip", "test", "simulator", "emulat"} {
			if strings.Contains(name, word) {
				t.Errorf("the configuration has a field %q", name)
			}
		}
	}
	_, err := ParseServerConfig([]byte(`{"id":"v","organization":"o","certificate":"c","key":"k","ca_certificate":"a","ca_key":"b","store":"s","ek_roots":["built-in"],"software_tpm":true}`))
	if err == nil || !strings.Contains(err.Error(), "software_tpm") {
		t.Errorf("a field that does not exist: %v", err)
	}
}
