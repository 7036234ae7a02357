package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"sekisho/attest"
)

// Paths of the admin API, on a unix socket that only its owner can open.
const (
	AdminTickets    = "/admin/v1/tickets"    // POST TicketRequest → TicketResponse
	AdminDevices    = "/admin/v1/devices"    // GET → []Device; /{id} → Device
	AdminResults    = "/admin/v1/results"    // GET → []attest.Result, oldest first
	AdminReferences = "/admin/v1/references" // GET → []Reference; POST values; DELETE ?id=
)

// TicketRequest asks for a ticket.
type TicketRequest struct {
	Uses    int   `json:"uses"`
	Seconds int64 `json:"seconds"` // until it expires
}

// TicketResponse is a new ticket. Its text is shown this once.
type TicketResponse struct {
	Ticket  string    `json:"ticket"` // secret
	ID      string    `json:"id"`
	Uses    int       `json:"uses"`
	Expires time.Time `json:"expires"`
}

// Reference is one image that is accepted.
type Reference struct {
	ID      string                 `json:"id"`
	Source  string                 `json:"source"` // "configuration" or "registry"
	PCRs    map[int]attest.Digest  `json:"pcrs"`
	Details attest.ReferenceValues `json:"-"`
}

// ServeAdmin serves the admin API on a new unix socket at path, mode 0600,
// until ctx ends.
func ServeAdmin(ctx context.Context, path string, s *Service, log *slog.Logger) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("admin socket: %w", err)
	}
	// The socket is made in a directory of our own, so nobody can connect
	// between its birth and its mode.
	dir, err := os.MkdirTemp(parent(path), ".admin")
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(dir+"/s", 0o600), os.Rename(dir+"/s", path)); err != nil {
		return errors.Join(fmt.Errorf("admin socket: %w", err), l.Close())
	}
	defer os.Remove(path)
	return serve(ctx, l, AdminHandler(s, log), log)
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "."
}

// AdminHandler returns the admin API.
func AdminHandler(s *Service, log *slog.Logger) http.Handler {
	a := &admin{s, log}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+AdminTickets, a.createTicket)
	mux.HandleFunc("GET "+AdminDevices, a.devices)
	mux.HandleFunc("GET "+AdminDevices+"/{id}", a.device)
	mux.HandleFunc("GET "+AdminResults, func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, s.Results()) })
	mux.HandleFunc("GET "+AdminReferences, a.references)
	mux.HandleFunc("POST "+AdminReferences, a.addReference)
	mux.HandleFunc("DELETE "+AdminReferences, a.removeReference)
	a.identityRoutes(mux)
	a.policyRoutes(mux)
	return mux
}

type admin struct {
	*Service
	log *slog.Logger
}

// adminError is the body of an answer that is not 200.
type adminError struct {
	Error string `json:"error"`
}

func (a *admin) fail(w http.ResponseWriter, code int, err error) {
	reply(w, code, adminError{err.Error()})
}

func (a *admin) createTicket(w http.ResponseWriter, r *http.Request) {
	var req TicketRequest
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	text, t, err := a.CreateTicket(req.Uses, time.Duration(req.Seconds)*time.Second)
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	a.log.Info("ticket created", "id", t.ID, "uses", t.Uses, "expires", t.Expires)
	reply(w, http.StatusOK, TicketResponse{text.Reveal(), t.ID, t.Uses, t.Expires})
}

func (a *admin) devices(w http.ResponseWriter, _ *http.Request) {
	list := []Device{}
	err := a.Store.View(func(r *Registry) error {
		for _, d := range r.Devices {
			list = append(list, d)
		}
		return nil
	})
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	slices.SortFunc(list, func(x, y Device) int { return strings.Compare(x.ID.String(), y.ID.String()) })
	reply(w, http.StatusOK, list)
}

func (a *admin) device(w http.ResponseWriter, r *http.Request) {
	var id attest.Digest
	if err := id.UnmarshalText([]byte(r.PathValue("id"))); err != nil {
		a.fail(w, http.StatusBadRequest, fmt.Errorf("device id: %w", err))
		return
	}
	var d Device
	found := false
	if err := a.Store.View(func(reg *Registry) error {
		d, found = reg.Devices[id]
		return nil
	}); err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	if !found {
		a.fail(w, http.StatusNotFound, fmt.Errorf("device %s is not enrolled", id))
		return
	}
	reply(w, http.StatusOK, d)
}

func (a *admin) references(w http.ResponseWriter, _ *http.Request) {
	list := []Reference{}
	for _, v := range a.References {
		list = append(list, Reference{ReferenceID(v), "configuration", v.PCRs, v})
	}
	if err := a.Store.View(func(r *Registry) error {
		for _, id := range slices.Sorted(maps.Keys(r.References)) {
			list = append(list, Reference{id, "registry", r.References[id].PCRs, r.References[id]})
		}
		return nil
	}); err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	reply(w, http.StatusOK, list)
}

func (a *admin) addReference(w http.ResponseWriter, r *http.Request) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, attest.MaxMessage))
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	v, err := attest.ParseReferenceValues(data)
	if err == nil && a.Policies != nil {
		err = errors.New("policy_keys are configured: reference values come in a signed policy, see attestctl policy")
	}
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	id := ReferenceID(*v)
	if err := a.Store.Update(func(reg *Registry) error {
		reg.References[id] = *v
		return nil
	}); err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	a.log.Info("reference values added", "id", id)
	reply(w, http.StatusOK, Reference{id, "registry", v.PCRs, *v})
}

func (a *admin) removeReference(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	found := false
	if err := a.Store.Update(func(reg *Registry) error {
		_, found = reg.References[id]
		delete(reg.References, id)
		return nil
	}); err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	if !found {
		a.fail(w, http.StatusNotFound, fmt.Errorf("no reference values %q in the registry; those of the configuration are removed there", id))
		return
	}
	a.log.Info("reference values removed", "id", id)
	reply(w, http.StatusOK, struct{}{})
}
